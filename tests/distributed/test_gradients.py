"""Gradients of three ranks together are those of one."""

from tests.conftest import program


def test_gradients_of_three_ranks_are_those_of_one() -> None:
    """In bf16 and fp32; flat tensors inside DeepSpeed's bucket and beyond it; with padding."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    result = program(*words, "tests/distributed/gradients.py")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.count("agrees") == 3
