"""Start ranks with torchrun, and end with their exit status.

examples, with the same command on each of two hosts:
  python launch/torchrun.py --nnodes=2 --nproc-per-node=8 \\
      --rdzv-backend=c10d --rdzv-endpoint=host1:29500 \\
      --module i3dist train --config tiny

Takes torchrun's options (torchrun --help lists them). torchrun itself ends with
status 1 whatever its ranks end with. This program ends with the status of the
rank that ended first: 75 asks to be started again, 1 is an error.

SIGTERM, SIGUSR1 and SIGHUP go to this host's ranks, which save and end with 75.
A second one changes nothing. --max-restarts starts no ranks again after one.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from i3dist.cli.program import ArgumentParser, one_line_errors
from i3dist.distributed.attempt import REQUEUE
from i3dist.distributed.held_signals import SIGNALS, awaited
from i3dist.engine.toolchain import variables
from i3dist.errors import UserError, reason

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

PATIENCE = 10  # seconds for the agent to notice that all ranks of this host have ended


def main() -> int:
    """Run torchrun's agent with the command line's words; returns the status to end with."""
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        summary, _, more = (__doc__ or "").partition("\n\n")
        usage = "%(prog)s [OPTIONS] PROGRAM ..."
        ArgumentParser(description=summary, epilog=more, usage=usage).print_help()
        return 0
    # Else an agent that does not reach the others, or whose peer has left, says so in 25 lines. The
    # ranks choose for themselves.
    with variables(TORCH_CPP_LOG_LEVEL=os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL")):
        from torch.distributed import DistError, run  # takes seconds
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousError

    arguments = run.parse_args(sys.argv[1:])
    # On its other signals the agent ends the ranks, and then with 1.
    arguments.signals_to_handle = "SIGINT,SIGQUIT"
    told = pass_signals_on()
    agents = start_again_unless(told)
    patience = PATIENCE + arguments.monitor_interval  # the agent looks once in so many seconds
    watch = [told, patience]
    threading.Thread(target=leave_stuck_agent, args=watch, name="agent", daemon=True).start()
    try:
        run.run(arguments)
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        status = status_of(first.exitcode, told)
        if status != REQUEUE:
            say_ended(agents)
        return status
    except (RendezvousError, DistError) as error:
        # What listened ended with the ranks of its host, so the agent has ended those of this one.
        if (chosen := status_of_ranks(agents)) is not None:
            return chosen
        place = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
        raise UserError(
            f"the hosts do not meet at {place}, or what listens there has ended "
            f"({reason(error.__cause__ or error)}): start the same command on every host "
            f"(--nnodes={arguments.nnodes}) within ten minutes, with the name and a free port of "
            "one of them (--rdzv-endpoint, or --master-addr and --master-port)"
        ) from None
    return 0


def pass_signals_on() -> list[int]:
    """From now on send the first of `SIGNALS` to the ranks; returns a list of those that came.

    While there are no ranks, a signal ends this process with `REQUEUE`. A thread receives them,
    because the main thread runs no handlers while it waits for the agents of other hosts. They are
    not blocked (`held_signals.hold`), because ranks would inherit that, whatever their program.
    """
    told: list[int] = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in awaited():
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while True:
            number = os.read(reader, 1)[0]
            if number not in SIGNALS:
                continue
            ranks, ended = psutil.Process().children(), exit_codes()
            if not ranks:
                os._exit(REQUEUE)
            if ended is not None:
                os._exit(status_of(first_failure(ended), told))
            told.append(number)
            for rank in ranks if len(told) == 1 else ():
                with suppress(psutil.Error):  # it has just ended
                    rank.send_signal(number)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    return told


def start_again_unless(told: list[int]) -> "list[LocalElasticAgent]":
    """From now on have agents start ranks again (--max-restarts) only while `told` is empty.

    Else ranks that have saved because they were told to stop would train on. Returns a list of the
    agents that have ranks.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    monitor = LocalElasticAgent._monitor_workers
    agents: list[LocalElasticAgent] = []

    def watch(agent: LocalElasticAgent, ranks: "WorkerGroup") -> "RunResult":
        if told:
            agent._remaining_restarts = 0
        agents[:] = [agent]
        return monitor(agent, ranks)

    LocalElasticAgent._monitor_workers = watch  # type: ignore[method-assign]
    return agents


def say_ended(agents: "list[LocalElasticAgent]") -> None:
    """Tell ranks of other hosts that those of this one have failed: they may wait to meet them."""
    from i3dist.distributed import rendezvous

    for agent in agents:
        group = agent.get_worker_group()
        spec = group.spec
        if group.group_world_size == 1 or not spec.rdzv_handler.use_agent_store:
            continue
        attempt = spec.max_restarts - agent._remaining_restarts
        ranks = [worker.global_rank for worker in group.workers]
        place = str(group.master_addr), int(group.master_port or 0)
        rendezvous.say_ended(*place, attempt, ranks)


def status_of_ranks(agents: "list[LocalElasticAgent]") -> int | None:
    """What this host's ranks, which the agent has ended, chose to end with; None if one did not."""
    handlers = [getattr(agent._pcontext, "subprocess_handlers", {}) for agent in agents]
    codes = [handler.proc.returncode for ranks in handlers for handler in ranks.values()]
    if not codes or any(code is None or code < 0 for code in codes):
        return None
    return first_failure(codes)


def leave_stuck_agent(told: list[int], patience: float) -> None:
    """End this process as its ranks did, if the agent does not notice that they have ended.

    The agent asks one of the hosts for news ten times a second, and waits for an answer without any
    limit: for ever where that host is without power, or the link to it is down.
    """
    unnoticed, codes = 0, None
    while unnoticed < patience:
        time.sleep(1)  # counted: a process that was suspended has not waited
        codes = exit_codes()
        unnoticed = 0 if codes is None else unnoticed + 1
    assert codes is not None
    print(
        "warning: torchrun's agent waits for another host, which does not answer; it ends, as the "
        "ranks of this host have",
        file=sys.stderr,
        flush=True,
    )
    os._exit(status_of(first_failure(codes), told))


def exit_codes() -> list[int] | None:
    """What this host's ranks ended with, below 0 by a signal, before the agent has noticed.

    None while one of them runs, and once the agent has noticed.
    """
    codes = []
    for rank in psutil.Process().children():
        try:
            ended = os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # the agent has just noticed
            return None
        if ended is None:
            return None
        codes.append(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
    return codes or None


def first_failure(codes: list[int]) -> int:
    """Of ranks that ended together: the signal that ended one, else an error, else a request."""
    return min(filter(None, codes), default=0)


def status_of(exitcode: int, told: list[int]) -> int:
    """The status to end with if the first rank ended with `exitcode`, below 0 by a signal.

    A rank that had not begun yet dies of a signal in `told`; then nothing is lost.
    """
    if exitcode >= 0:
        return exitcode
    return REQUEUE if -exitcode in told else 128 - exitcode


def start() -> None:
    """Run the program."""
    with one_line_errors():
        sys.exit(main())


if __name__ == "__main__":
    start()
