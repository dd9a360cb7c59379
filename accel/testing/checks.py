"""The checks that every op and backend must pass: the behaviour that is the same for all of them, and all together."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import unittest
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from accel import dispatch
from accel.testing import guard
from accel.testing.running import (
    SEED,
    Case,
    Run,
    double,
    expected_calls,
    op_of,
    poisoned,
    prepared,
    random_like,
    record,
    require,
    run,
    threads,
    watch,
)
from accel.testing.tolerance import HALVES, assert_close, assert_same
from accel.testing.values import check_gradcheck, check_values


def _check_equal(got: Run, want: Run, what: str) -> None:
    assert got.named().keys() == want.named().keys(), f"{what}: {got.grads.keys()} against {want.grads.keys()}"
    for name, expected in want.named().items():
        assert_same(got.named()[name], expected, f"{what}: {name}")


def _error(call: Callable[[], Any]) -> Exception | None:
    """What ``call()`` raises."""
    try:
        call()
    except Exception as error:
        return error
    return None


# --- behaviour: each takes (function, case, backend, device) and needs a case with a gradient ---


def check_subsets(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Asking for some gradients changes none of them and brings no others."""
    tensors, kwargs, grad_out = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    full = run(function, tensors, kwargs, backend, grad_out=grad_out)
    names = list(full.grads)
    for count in range(len(names)):
        for needs in itertools.combinations(names, count):
            got = run(function, tensors, kwargs, backend, needs, grad_out)
            _check_equal(got, Run(full.out, {n: full.grads[n] for n in needs}), f"gradients of {needs} alone")


def check_opcheck(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """``torch.library.opcheck`` of the registered forward and backward on the case's own arguments."""
    calls = record(function, case, backend, torch.float32, device)
    if backend == "reference":
        assert not calls, f"the reference is differentiated by autograd, yet {calls} ran"
        return
    own = [op for op, _ in calls if op.name().startswith(f"accel::{op_of(function).name}_")]  # others may stand before
    assert len(own) == 2, f"one forward and one backward expected, got {[str(op) for op, _ in calls]}"
    for overload, args in calls:
        torch.library.opcheck(overload, args)


@contextlib.contextmanager
def _compiled(function: Callable[..., Any], kwargs: dict[str, Any], compiler: str) -> Iterator[Callable[..., Any]]:
    """``function`` with ``kwargs``, compiled in one graph; tensors and ``backend`` are left to give."""

    def call(backend: str | None = None, **given: Tensor) -> Any:
        return function(**given, **kwargs, backend=backend)

    torch._dynamo.reset()
    try:
        yield torch.compile(call, backend=compiler, fullgraph=True, dynamic=False)
    finally:
        torch._dynamo.reset()


def check_compile(
    function: Callable[..., Any], case: Case, backend: str, device: str = "cpu", compiler: str = "aot_eager"
) -> None:
    """``torch.compile`` takes it in one graph, forward and backward, with the eager result."""
    tensors, kwargs, grad_out = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    eager = run(function, tensors, kwargs, backend, grad_out=grad_out)
    with _compiled(function, kwargs, compiler) as compiled, watch(op_of(function)) as ran:
        got = run(compiled, tensors, {}, backend, grad_out=grad_out)
    assert ran == expected_calls(backend, "forward", "backward"), f"{ran=} when {backend} is asked for by name"
    assert got.named().keys() == eager.named().keys(), f"{got.grads.keys()=}, {eager.grads.keys()=}"
    for name, expected in eager.named().items():
        assert_close(got.named()[name], expected, f"{case.family}_grad", torch.float32, f"compiled {name}")


def check_compiled_use(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Compiled code heeds ``accel.use`` as it stands at each call."""
    tensors, kwargs, _ = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    with _compiled(function, kwargs, "eager") as compiled, watch(op_of(function)) as ran:
        for asked in (backend, "reference", backend):
            ran.clear()
            with dispatch.use(backend=asked):
                run(compiled, tensors, {}, None, needs=())
            assert ran == expected_calls(asked, "forward"), f"{ran=} under use(backend={asked!r})"


def check_empty(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """A batch of none gives an empty output and zero gradients."""
    tensors, kwargs, _ = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    full = run(function, tensors, kwargs, backend, needs=())
    none = {n: t[:0] if n in case.batched else t for n, t in tensors.items()}
    assert any(t.numel() == 0 for t in none.values()), f"case {case} names no batched tensor"
    got = run(function, none, kwargs, backend)
    assert got.out.shape == (0, *full.out.shape[1:]), f"{tuple(got.out.shape)=}, {tuple(full.out.shape)=}"
    for name, grad in got.grads.items():
        if grad is not None:
            assert_same(grad, torch.zeros_like(none[name]), f"gradient of {name} of an empty batch")


def _strided(x: Tensor) -> Tensor:
    """The values of ``x`` at every second element of NaN-filled memory, the first at an odd offset."""
    if x.dim() == 0:
        return x
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype, device=x.device)
    view = wide[..., 1::2]
    view.copy_(x)
    return view


def _turned(x: Tensor) -> Tensor:
    """The values of ``x`` with the order of the axes in memory reversed."""
    turned = list(range(x.dim()))[::-1]
    return x.permute(turned).contiguous().permute(turned)


def _tokens_first(x: Tensor) -> Tensor:
    """The values of ``x`` with its second and third axis exchanged in memory, as a projection leaves heads."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 3 else x


def check_strides(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Values count, not their layout: inputs and upstream gradient in any strides give the same bits."""
    tensors, kwargs, grad_out = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    plain = run(function, tensors, kwargs, backend, grad_out=grad_out)
    for layout in (_strided, _turned):
        moved = {n: layout(t) if t.is_floating_point() else t for n, t in tensors.items()}
        got = run(function, moved, kwargs, backend, grad_out=layout(grad_out))
        _check_equal(got, plain, f"non-contiguous by {layout.__name__}")
    ones = torch.ones((), device=device).expand(grad_out.shape)  # what out.sum().backward() sends
    got = run(function, tensors, kwargs, backend, grad_out=ones)
    _check_equal(got, run(function, tensors, kwargs, backend, grad_out=ones.contiguous()), "expanded gradient")


def check_poison(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Every element of outputs and of scratch memory is written before it is read."""
    for dtype in case.dtypes:
        tensors, kwargs, grad_out = prepared(function, case, dtype, device)
        require(function, backend, tensors, kwargs)
        plain = run(function, tensors, kwargs, backend, grad_out=grad_out)
        with poisoned():
            assert torch.empty(3, device=device).isnan().all(), "torch does not fill fresh memory"
            _check_equal(run(function, tensors, kwargs, backend, grad_out=grad_out), plain, f"poisoned memory, {dtype}")


def check_repeat(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """The same bits every time, whatever the number of threads, and from a graph that is walked twice."""
    for dtype in case.dtypes:
        tensors, kwargs, grad_out = prepared(function, case, dtype, device)
        require(function, backend, tensors, kwargs)
        with threads(1):
            first = run(function, tensors, kwargs, backend, grad_out=grad_out)
            _check_equal(run(function, tensors, kwargs, backend, grad_out=grad_out), first, f"repeat, {dtype}")
        for count in (2, 3):
            # torch's own matrix products, which the reference is made of, promise no such thing
            if backend != "reference":
                with threads(count):
                    again = run(function, tensors, kwargs, backend, grad_out=grad_out)
                _check_equal(again, first, f"{count} threads, {dtype}")
    given = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    torch.manual_seed(SEED)
    out = function(**given, **kwargs, backend=backend)
    leaves = [t for t in given.values() if t.requires_grad]
    once = torch.autograd.grad(out, leaves, grad_out, retain_graph=True, materialize_grads=True)
    twice = torch.autograd.grad(out, leaves, grad_out, materialize_grads=True)
    for name, a, b in zip(given, once, twice, strict=False):
        assert_same(b, a, f"second walk of the graph: {name}")


def check_batch(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """A kernel's result for one element of the batch does not depend on what else is in it."""
    tensors, kwargs, grad_out = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    if backend == "reference":
        raise unittest.SkipTest("torch's matrix products choose their path by the batch")
    kwargs = {n: 0.0 if n == "dropout_p" else v for n, v in kwargs.items()}  # its bits are drawn by the position
    needs = [n for n in case.batched if tensors[n].is_floating_point()]
    whole = run(function, tensors, kwargs, backend, needs, grad_out)
    for i in range(len(whole.out)):
        one = {n: t[i : i + 1] if n in case.batched else t for n, t in tensors.items()}
        got = run(function, one, kwargs, backend, needs, grad_out[i : i + 1])
        for name, value in whole.named().items():
            assert_same(got.named()[name], value[i : i + 1], f"element {i} of the batch alone: {name}")


def check_second_derivative(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """A second derivative is refused in words by a kernel, also where the loss is linear in the output; by the
    reference, too, where the gradient passes roundings by."""
    tensors, kwargs, grad_out = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    if backend == "reference" and not op_of(function).straight_through:
        raise unittest.SkipTest("gradcheck covers the reference's second derivatives")
    for upstream in (grad_out, grad_out.clone().requires_grad_()):
        given = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
        out = function(**given, **kwargs, backend=backend)
        main = next(iter(given.values()))
        (grad,) = torch.autograd.grad(out, main, upstream, create_graph=True)
        error = _error(grad.square().sum().backward)
        assert isinstance(error, NotImplementedError), f"{backend} on a second derivative: {error!r}"
        assert re.search(f"{op_of(function).name}.*reference", str(error)), str(error)


def check_forward_mode(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """The reference's forward-mode derivative agrees with the gradient; a kernel refuses one in words, and so does the
    reference where the gradient passes roundings by."""
    tensors, kwargs, grad_out = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    derived = backend == "reference" and not op_of(function).straight_through
    given = double(tensors) if derived else tensors

    def refused(call: Callable[[], Any], what: str) -> None:
        error = _error(call)
        assert isinstance(error, NotImplementedError), f"{backend}, forward mode {what}: {error!r}"
        assert re.search(f"{op_of(function).name}.*forward-mode.*reference", str(error)), str(error)

    def along(name: str, tangent: Tensor) -> Tensor:
        def call(x: Tensor) -> Any:
            torch.manual_seed(SEED)
            return function(**{**given, name: x}, **kwargs, backend=backend)

        derivative: Tensor = torch.func.jvp(call, (given[name],), (tangent,))[1]
        return derivative

    for name in [n for n, t in given.items() if t.is_floating_point()]:
        tangent = random_like(given[name])
        if not derived:
            refused(functools.partial(along, name, tangent), f"by {name}")
            out = function(**{**given, name: given[name].detach().requires_grad_()}, **kwargs, backend=backend)
            with forward_ad.dual_level():
                upstream = forward_ad.make_dual(grad_out, grad_out)
                refused(functools.partial(out.backward, upstream), f"through the gradient of {name}")
            continue
        grad = run(function, given, kwargs, backend, [name], grad_out.double()).grads[name]
        assert grad is not None
        got, want = (along(name, tangent) * grad_out).sum(), (grad * tangent).sum()
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-8), f"{name}: {got=}, {want=}"


def check_transforms(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """``torch.func.grad`` is right; ``vmap`` is right, or a kernel refuses it in words."""
    tensors, kwargs, grad_out = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    main, *_ = tensors
    rest = {n: t for n, t in tensors.items() if n != main}

    def call(x: Tensor) -> Any:
        torch.manual_seed(SEED)
        return function(**{main: x}, **rest, **kwargs, backend=backend)

    grad = torch.func.grad(lambda x: (call(x) * grad_out).sum())(tensors[main])
    want = run(function, tensors, kwargs, backend, [main], grad_out).grads[main]
    assert want is not None
    assert_same(grad, want, "torch.func.grad")
    stacked = torch.stack([tensors[main], tensors[main].flip(0)])
    mapped: list[Tensor] = []
    error = _error(lambda: mapped.extend(torch.func.vmap(call, randomness="same")(stacked)))
    if error is None:  # torch may do one element after the other
        for i in range(2):
            assert_close(mapped[i], call(stacked[i]), case.family, torch.float32, f"vmap element {i}")
    else:
        assert backend != "reference", f"vmap on the reference: {error!r}"
        assert isinstance(error, RuntimeError), f"vmap on {backend}: {error!r}"
        assert "vmap" in str(error), f"vmap is refused without saying so: {error}"


def check_checkpoint(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Activation checkpointing, which runs the forward again, gives the same bits; dropout included."""
    tensors, kwargs, grad_out = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    plain = run(function, tensors, kwargs, backend, grad_out=grad_out)

    def positional(*values: Tensor) -> Any:
        return function(**dict(zip(tensors, values, strict=True)), **kwargs, backend=backend)

    def checkpointed(reentrant: bool, backend: str | None = None, **given: Tensor) -> Any:
        return checkpoint(positional, *given.values(), use_reentrant=reentrant)

    for reentrant in (False, True):
        call: Any = functools.partial(checkpointed, reentrant)
        if reentrant:  # torch.autograd.grad is not offered there
            given = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
            torch.manual_seed(SEED)
            out = call(**given)
            out.backward(grad_out)
            got = Run(out.detach(), {n: given[n].grad for n in plain.grads})
        else:
            got = run(call, tensors, {}, backend, grad_out=grad_out)
        _check_equal(got, plain, f"checkpoint, {reentrant=}")


def check_autocast(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Under autocast the main tensors are cast, small parameters are not, and gradients have their tensors' dtypes."""
    tensors, kwargs, grad_out = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    main, *_ = tensors

    def cast_inside(dtype: torch.dtype, **given: Any) -> Any:  # as advised, only the forward runs under autocast
        with torch.autocast(device, dtype):
            return function(**given)

    for dtype in HALVES:
        call = functools.partial(cast_inside, dtype)
        got = run(call, tensors, kwargs, backend, grad_out=grad_out.to(dtype))
        cast = {n: t.to(dtype) if n in (case.autocast or (main,)) else t for n, t in tensors.items()}
        want = run(function, cast, kwargs, backend, grad_out=grad_out.to(dtype))
        assert got.out.dtype == dtype, f"{got.out.dtype=} under autocast to {dtype}"
        assert_same(got.out, want.out, f"autocast to {dtype}")
        for name, grad in got.grads.items():
            expected = want.grads[name]
            assert (grad is None) == (expected is None), f"autocast to {dtype}: gradient of {name}"
            if grad is not None and expected is not None:
                assert grad.dtype == tensors[name].dtype, f"gradient of {name} is {grad.dtype} under autocast"
                assert_same(grad, expected.to(grad.dtype), f"autocast to {dtype}: gradient of {name}")


def check_inplace(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Overwriting an input between forward and backward is an error, not a wrong gradient."""
    tensors, kwargs, grad_out = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)
    given = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    out = function(**given, **kwargs, backend=backend)
    with torch.no_grad():
        next(iter(given.values())).mul_(2.0)
    error = _error(lambda: out.backward(grad_out))
    if error is None:
        assert backend == "reference", f"{backend} differentiated at values that are gone"
    else:
        assert "modified by an inplace operation" in str(error), repr(error)


def check_changed_output(function: Callable[..., Any], case: Case, backend: str, device: str = "cpu") -> None:
    """Changing the output in place gives the gradients of doing so out of place. Where the backward reads the output,
    torch refuses, as for its own softmax."""
    tensors, kwargs, grad_out = prepared(function, case, torch.float32, device)
    require(function, backend, tensors, kwargs)

    def changed(backend: str | None = None, **given: Tensor) -> Any:
        return function(**given, **kwargs, backend=backend).mul_(2.0).add_(1.0)

    def computed(backend: str | None = None, **given: Tensor) -> Any:
        return function(**given, **kwargs, backend=backend) * 2.0 + 1.0

    for layout in (lambda x: x, _tokens_first):  # of which some outputs begin as views
        moved = {n: layout(t) if t.is_floating_point() else t for n, t in tensors.items()}
        _check_changed(computed, changed, function, case, moved, backend, grad_out)


def _check_changed(
    computed: Callable[..., Any],
    changed: Callable[..., Any],
    function: Callable[..., Any],
    case: Case,
    tensors: dict[str, Tensor],
    backend: str,
    grad_out: Tensor,
) -> None:
    want = run(computed, tensors, {}, backend, grad_out=grad_out)
    got: list[Run] = []
    error = _error(lambda: got.append(run(changed, tensors, {}, backend, grad_out=grad_out)))
    if error is None:
        for name, expected in want.named().items():
            assert_close(
                got[0].named()[name], expected, f"{case.family}_grad", torch.float32, f"changed in place: {name}"
            )
    else:
        assert "modified by an inplace operation" in str(error), repr(error)
        schema = getattr(torch.ops.accel, f"{op_of(function).name}_backward").default._schema
        read = [argument.name for argument in schema.arguments]
        assert backend != "reference", repr(error)
        assert "out" in read, f"{backend} keeps its output, and its backward reads {read}"


def check_guard_pages(function: Callable[..., Any], cases: Iterable[Case], backend: str) -> None:
    """No read or write past either end of any tensor: each case's registered ops, in one of its dtypes in turn, run
    again in a process of their own on tensors that touch an unreadable page, first at their end, then at their start.
    """
    calls = [
        (f"{case} {dtype} {overload.name()}", overload.name(), args)
        for i, case in enumerate(cases)
        for dtype in [case.dtypes[i % len(case.dtypes)]]
        for overload, args in record(function, case, backend, dtype)
    ]
    assert calls, f"no registered op of {backend} was called"
    loaded = [module for module, (_, reason) in dispatch._leaves.items() if reason is None]
    guard.replay(calls, ("accel", *loaded))


BEHAVIOUR: tuple[Callable[..., None], ...] = (
    check_subsets,
    check_opcheck,
    check_compile,
    check_compiled_use,
    check_empty,
    check_strides,
    check_poison,
    check_repeat,
    check_batch,
    check_second_derivative,
    check_forward_mode,
    check_transforms,
    check_checkpoint,
    check_autocast,
    check_inplace,
    check_changed_output,
)


def check_op(
    function: Callable[..., Any],
    values: Iterable[Case],
    behaviour: Iterable[Case],
    gradients: Iterable[Case],
    backends: Iterable[str],
    device: str = "cpu",
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check of the op, as ``(name, check)``, ready to be a parametrized test.

    ``values`` are the cases whose numbers are compared, one check for each backend and dtype. ``behaviour`` are
    small cases with a batch of at least two; between them they have every differentiable tensor. What is not about
    numbers runs on them. ``gradients`` are a few tiny cases for finite differences on the reference.
    """
    values, behaviour, backends = tuple(values), tuple(behaviour), tuple(backends)

    def bind(check: Callable[..., None], *args: Any) -> Callable[[], None]:
        def bound() -> None:
            with threads(1):  # torch's own small products take ten times as long on more threads than free cores
                check(function, *args)

        return bound

    for case in gradients:
        yield f"reference-gradcheck-{case}", bind(check_gradcheck, case, device)
    for case in values:
        for dtype, backend in itertools.product(case.dtypes, backends):
            name = f"{backend}-{str(dtype).removeprefix('torch.')}-{case}"
            yield name, bind(check_values, case, backend, dtype, device)
    for backend in backends:
        for check, case in itertools.product(BEHAVIOUR, behaviour):
            yield f"{backend}-{check.__name__.removeprefix('check_')}-{case}", bind(check, case, backend, device)
        if device == "cpu" and backend != "reference":
            yield f"{backend}-guard_pages", bind(check_guard_pages, (*values, *behaviour), backend)
