"""Functions that torch compiles, kept whole: a later process loads them and traces nothing.

torch's own caches hold what became of a graph, and are asked once the graph is there: tracing the
training step in Python takes 10 s. A whole function can be kept too (`aot_compile`), without what
torch checks before each call. So what it was compiled for is described here, and is in its file's
name: dtypes, shapes and strides of all tensors, values of all else, and what torch was set to.
"""

import hashlib
import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from i3dist.files import regular, write_whole

Call = Callable[..., Any]
Form = tuple[Any, ...]  # what a function is compiled for


class Prepared(NamedTuple):
    """A function that this process has."""

    code: CodeType
    how: str  # "loaded", "compiled", or "traced": by torch as usual, and not kept
    seconds: float  # that it took


prepared: list[Prepared] = []
_log = logging.getLogger(__name__)
_folder: Path | None = None
_noted: dict[Path, Callable[[], object]] | None = None
# Of a module: what is constant in it, and where it has its tensors, as others may come there.
_parts: WeakKeyDictionary[nn.Module, tuple[Form, list[Any]]] = WeakKeyDictionary()


def keep_in(folder: Path | None) -> None:
    """Load functions from a folder, which need not exist, and keep there those that are compiled.

    Args:
        folder: of one model's code and settings, of one version of torch and of one kind of CPU:
            what a function calls, and what it runs on there, is not described. None keeps nothing.
    """
    global _folder
    _folder = folder


@contextmanager
def noting() -> Iterator[dict[Path, Callable[[], object]]]:
    """Inside, nothing is compiled, and functions run as Python.

    Yields:
        For each function that would be compiled or loaded, where it is kept, and what does so.
    """
    global _noted
    _noted = {}
    try:
        yield _noted
    finally:
        _noted = None


def is_noting() -> bool:
    """Whether this is inside of `noting`."""
    return _noted is not None


class Compiled:
    """A function, compiled for each form of its arguments.

    It may depend on nothing else but constants, may change tensors only in place, and must be one
    graph to be kept; another is compiled by torch as usual.
    """

    def __init__(self, function: Call, **options: Any):
        """`options` are those of `torch.compile`."""
        self._function, self._options = function, options
        self._traced: Call = torch.compile(function, dynamic=False, options=options)
        self._ready: dict[Form, Call] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The function's result."""
        if _folder is None or torch.compiler.is_compiling() or _eager():
            return self._traced(*arguments, **named)
        grads = torch.is_grad_enabled()
        form = grads, _form((arguments, named))
        if form not in self._ready:
            name = self._function.__module__, self._function.__qualname__
            about = repr((name, self._options, _settings(), form))
            path = _folder / hashlib.sha256(about.encode()).hexdigest()
            prepare = partial(self._prepare, path, grads, arguments, named)
            if _noted is not None:
                _noted.setdefault(path, prepare)
                return self._function(*arguments, **named)
            self._ready[form] = prepare()
        return self._ready[form](*arguments, **named)

    def _prepare(self, path: Path, grads: bool, arguments: Form, named: dict[str, Any]) -> Call:
        """The function for arguments like these: loaded, or compiled and kept, or else traced."""
        begun = time.monotonic()
        call, how = _load(path, self._function.__globals__), "loaded"
        if call is None:
            with torch.set_grad_enabled(grads):
                call, how = self._compile(path, arguments, named), "compiled"
        if call is None:
            call, how = self._traced, "traced"
        prepared.append(Prepared(self._function.__code__, how, time.monotonic() - begun))
        return call

    def _compile(self, path: Path, arguments: Form, named: dict[str, Any]) -> Call | None:
        """Compile the function for arguments like these, and keep it; None if it cannot be kept."""
        options = self._options | {"guard_filter_fn": lambda guards: [False] * len(guards)}
        traced: Any
        try:
            with torch._dynamo.config.patch(enable_aot_compile=True):
                traced = torch.compile(
                    self._function, fullgraph=True, dynamic=False, options=options
                )
                made = traced.aot_compile((arguments, named))
            content = type(made).serialize(made).serialized_data
        except Exception as error:
            _log.info(
                "%s is compiled at every start: %s", self._function.__qualname__, _line(error)
            )
            return None
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        return cast("Call", made.fn)


def _load(path: Path, names: dict[str, Any]) -> Call | None:
    """A function that was kept, whose global names are these; None if it cannot be used."""
    made: Any
    try:
        content = regular(path).read_bytes()
    except OSError:
        return None
    try:
        made = torch.compiler.load_compiled_function(io.BytesIO(content), f_globals=names)
    except Exception as error:  # it is damaged, or of another GPU
        _log.info("compiled anew, as what was kept cannot be used: %s", _line(error))
        return None
    return cast("Call", made.fn)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _eager() -> bool:
    """Whether the caller wants torch to compile nothing, or otherwise than by default."""
    stance = getattr(torch._dynamo.eval_frame, "_stance", None)  # torch's own
    return stance is None or stance.stance != "default"


def _settings() -> Form:
    """What the compiler was told, beside its options, and which GPU it compiles for."""
    return (
        torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        sorted(torch._inductor.config.save_config_portable().items()),
        torch._functorch.config.get_hash(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
    )


def _form(x: Any, numbers: dict[int, int] | None = None) -> Any:
    """What code that was compiled for x depends on; it can be hashed, and its `repr` is the same in
    every process.

    Args:
        x: an argument, or all of them.
        numbers: of the tensors described so far, by identity: code that was compiled for one tensor
            named twice reads it once.
    """
    numbers = {} if numbers is None else numbers
    if isinstance(x, Tensor):
        number = numbers.setdefault(id(x), len(numbers))
        return (number, *x.shape, *x.stride(), x.dtype, x.device, x.requires_grad)
    if isinstance(x, nn.Module):
        if x not in _parts:
            tensors = [held for part in x.modules() for held in (part._parameters, part._buffers)]
            _parts[x] = _form_of_module(x), tensors
        constants, tensors = _parts[x]
        held = (tensor for part in tensors for tensor in part.values())
        return constants, *(_form(tensor, numbers) for tensor in held)
    if isinstance(x, (tuple, list)):
        return type(x).__name__, *(_form(part, numbers) for part in x)
    if isinstance(x, dict):
        return tuple((name, _form(value, numbers)) for name, value in x.items())
    if isinstance(x, FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or ()]
        code = x.__code__.co_code.hex(), x.__code__.co_names  # lambdas share a name
        return x.__module__, x.__qualname__, code, _form((cells, x.__defaults__), numbers)
    if isinstance(x, partial):
        return "partial", _form((x.func, x.args, x.keywords), numbers)
    if isinstance(x, MethodType):
        return "method", _form((x.__func__, x.__self__), numbers)
    return (type(x).__qualname__, _form(vars(x), numbers)) if hasattr(x, "__dict__") else repr(x)


def _form_of_module(module: nn.Module) -> Form:
    """The constants of a module and of those in it."""
    return tuple(
        (path, type(part).__qualname__, name, _form(value))
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if not (name.startswith("_") or callable(value))
    )
