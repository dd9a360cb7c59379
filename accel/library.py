"""One declaration per op: from the ``Args`` that every backend receives to two registered ops and their autograd.

A call goes one way. The public function checks its arguments into ``Args`` and hands them to what
:func:`differentiable` made: ``dispatch.select`` chooses a backend, autograd records the call where something requires a
gradient, and the registered op runs the backend's forward, later its backward.

Registered ops are opaque to torch.compile (``define``/``impl``, a third of the per-call cost of the ``custom_op``
decorator), and the backend is a string among their arguments.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from accel import dispatch, transforms

A = TypeVar("A", bound=tuple[Any, ...])
"""The ``Args`` of an op."""

# --- the declaration ---


def _like_inputs(args: Any, made: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients as most kernels give them: laid out as their tensors, empty in fp32 where one is not made."""
    nothing = args[0].new_empty
    return tuple(
        [
            torch.empty_like(x) if x is not None and wanted else nothing(0, dtype=torch.float32)
            for x, wanted in zip(args, made, strict=False)
        ]
    )


def _contiguous(grad: Tensor, args: Any) -> Tensor:
    return grad.contiguous()


def differentiable(
    name: str,
    args: Callable[..., A],
    reference: Callable[..., Any],
    *,
    gradients: int,
    fake: Callable[[A], Any],
    flops: Callable[[A], int],
    backward_flops: Callable[[A, Sequence[bool]], int],
    backward_fake: Callable[[A, Sequence[bool]], tuple[Tensor, ...]] = _like_inputs,
    always: int = 0,
    outputs: Sequence[str] = ("out",),
    differentiable_outputs: int = 1,
    keep_outputs: Sequence[str] = (),
    sizes_only: Sequence[str] = (),
    lay_out: Callable[[Tensor, A], Tensor] = _contiguous,
) -> Callable[..., Any]:
    """Register ``accel::<name>_forward`` and ``accel::<name>_backward``; return ``run(args, backend, used)`` for the
    op's public function.

    ``used`` says how many of the differentiable outputs the caller gets, None for all. The backward receives None as
    the gradient of the others, in compiled code too, which makes zeros for an output that is only thrown away.

    A backend's ``forward`` receives the fields of ``args``. Its ``backward`` receives the gradient of each
    differentiable output, the outputs that are kept, the fields, and ``needs``, a bool for each gradient that is
    not always made; it returns a gradient for each of the first fields. That of a small parameter may be fp32 beside
    a parameter in half precision: it is cast here.

    Args:
        args: the op's NamedTuple, tensors first. Its annotations are the schema.
        reference: the op in plain torch. It also takes every call in which a tensor is empty.
        gradients: how many of the first fields have a gradient.
        fake: the outputs without data.
        flops: those of the forward, a multiply-add counting two.
        backward_flops: those of the backward, given for each gradient whether it is made.
        backward_fake: the gradients without data, given the same.
        always: how many of the first gradients are made whether or not they are needed.
        outputs: their names.
        differentiable_outputs: how many of the first outputs have a gradient. Of several, one may be None.
        keep_outputs: those that the backward reads. One that the user gets must not be changed in place before the
            backward: torch refuses that then, as for its own softmax.
        sizes_only: the tensors of which the backward reads the sizes alone; it receives them behind the other tensors.
            ``backward_fake`` and ``backward_flops`` see a tensor of these sizes, None where the call had none.
        lay_out: brings the gradient of an output into the layout that backends expect, ``lay_out(grad, args)``.
    """
    layout = _read_layout(args, outputs, differentiable_outputs, keep_outputs, sizes_only, gradients > always)
    forward_op = register(
        f"{name}_forward",
        f"({layout.forward_arguments()}) -> {_tensors(len(outputs))}",
        lambda *given: _of_their_own(dispatch.OPS[name].backend(given[-1]).forward(*given[:-1])),
        lambda *given: fake(args(*given[:-1])),
        lambda *given: flops(args(*given[:-1])),
    )

    def backward(*given: Any) -> Any:
        chosen = dispatch.OPS[name].backend(given[-1]).backward
        assert chosen is not None
        return chosen(*given[:-1])

    def read(given: Sequence[Any]) -> tuple[A, list[bool]]:
        fields, needs = layout.read(given)
        return args(*fields), [True] * always + needs

    def fake_gradients(*given: Any) -> Any:
        made = backward_fake(*read(given))
        return made[0] if gradients == 1 else made

    backward_op = register(
        f"{name}_backward",
        f"({layout.backward_arguments()}) -> {_tensors(gradients)}",
        backward,
        fake_gradients,
        lambda *given: backward_flops(*read(given)),
    )
    recorded = {
        used: _autograd(name, args, reference, layout, forward_op, backward_op, gradients, always, lay_out, used)
        for used in range(1, differentiable_outputs + 1)
    }
    required = [i for i, kind in enumerate(layout.kinds) if kind == "Tensor"]

    def run(given: A, backend: str | dispatch.Backend | None = None, used: int | None = None) -> Any:
        if isinstance(backend, dispatch.Backend):  # selected already
            chosen = backend
        else:
            chosen = dispatch.select(dispatch.OPS[name], given, backend)
        if chosen.name == "reference" or any([given[i].numel() == 0 for i in required]):
            if dispatch.OPS[name].straight_through:
                refuse_forward_mode(name, given[:gradients])
            with without_autocast(given[0]):
                return reference(*given)
        if torch.compiler.is_compiling():
            given = args(*[_looked_at_anew(x) for x in given[:gradients]], *given[gradients:])
        if differentiated(name, given[:gradients]):
            return recorded[used or differentiable_outputs].apply(*given, chosen.name)
        if _is_plain_call(given):
            return _of_their_own(chosen.forward(*given))
        return forward_op(*given, chosen.name)  # torch.compile cannot trace autograd where nothing requires a gradient

    return run


def _is_plain_call(given: Iterable[Any]) -> bool:
    """Whether the call need not be one of a registered op: nothing is to see it, no subclass of a tensor either."""
    if not transforms.untraced():
        return False
    return all([type(x) in (Tensor, torch.nn.Parameter) for x in given if isinstance(x, Tensor)])


def _looked_at_anew(x: Any) -> Any:
    """A view of a tensor in a graph that is traced. Of a tensor that was made empty and then filled by writing to its
    views, torch.compile remembers that it required no gradient; of a view of it, it does not. Nor does it take one
    tensor twice."""
    return x.view_as(x) if isinstance(x, Tensor) else x


def _of_their_own(made: Any) -> Any:
    """Outputs that are no views of what a backend allocated for them: autograd refuses to change a view in place."""
    if isinstance(made, Tensor):
        own = torch.ops.aten._unsafe_view.default(made, made.shape) if made._is_view() else made
        return own if own.stride() == made.stride() else made  # an axis of one may have got another
    return tuple([_of_their_own(x) for x in made])


# --- what follows from the declaration: schemas, and where what stands among the arguments of the two ops ---

_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "Scalar",
    bool: "bool",
    str: "str",
    list[int]: "SymInt[]",
}
"""How a field of ``Args`` is annotated, and what it is in a schema: of the kinds for numbers those that take a symbol,
so that a graph need not be made anew where sizes vary."""


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


@dataclass(frozen=True)
class _Layout:
    fields: list[str]
    kinds: list[str]  # of each field, in the schema
    kept: list[int]  # the tensors that the backward receives
    sized: list[int]  # those of which it receives the sizes
    outputs: Sequence[str]
    differentiable_outputs: int
    kept_outputs: list[int]  # those that the backward receives
    asks: bool  # whether the backward is told which gradients are needed

    @property
    def tensors(self) -> int:
        return len(self.kept) + len(self.sized)

    def forward_arguments(self) -> str:
        fields = [f"{kind} {field}" for kind, field in zip(self.kinds, self.fields, strict=True)]
        return ", ".join([*fields, "str backend"])

    def backward_arguments(self) -> str:
        grad = "Tensor" if self.differentiable_outputs == 1 else "Tensor?"
        parts = [f"{grad} grad_{output}" for output in self.outputs[: self.differentiable_outputs]]
        parts += [f"Tensor {self.outputs[i]}" for i in self.kept_outputs]
        parts += [f"{self.kinds[i]} {self.fields[i]}" for i in self.kept]
        parts += [f"SymInt[] {self.fields[i]}_size" for i in self.sized]
        parts += [f"{self.kinds[i]} {self.fields[i]}" for i in range(self.tensors, len(self.fields))]
        return ", ".join([*parts, "bool[] needs", "str backend"] if self.asks else [*parts, "str backend"])

    def read(self, given: Sequence[Any]) -> tuple[list[Any], list[bool]]:
        """The fields, and the needs, from the arguments of a backward op."""
        *rest, _ = given[self.differentiable_outputs + len(self.kept_outputs) :]
        needs = rest.pop() if self.asks else []
        kept, sizes, others = rest[: len(self.kept)], rest[len(self.kept) : self.tensors], rest[self.tensors :]
        found = dict(zip(self.kept, kept, strict=True))
        found |= {i: given[0].new_empty(size) if size else None for i, size in zip(self.sized, sizes, strict=True)}
        return [*[found[i] for i in range(self.tensors)], *others], needs


def _read_layout(
    args: Callable[..., Any],
    outputs: Sequence[str],
    differentiable_outputs: int,
    keep_outputs: Sequence[str],
    sizes_only: Sequence[str],
    asks: bool,
) -> _Layout:
    hints = typing.get_type_hints(args)
    fields, kinds = list(hints), [_SCHEMA[kind] for kind in hints.values()]
    tensors = [i for i, kind in enumerate(kinds) if kind.startswith("Tensor")]
    if tensors != list(range(len(tensors))):
        raise TypeError(f"tensors come first in {args}, got {', '.join(fields)}")
    sized = [fields.index(field) for field in sizes_only]
    kept = [i for i in tensors if i not in sized]
    kept_outputs = [outputs.index(output) for output in keep_outputs]
    return _Layout(fields, kinds, kept, sized, outputs, differentiable_outputs, kept_outputs, asks)


def register(
    name: str,
    signature: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> Any:
    """Define ``accel::<name>`` with ``signature`` (``"(Tensor x, ...) -> Tensor"``) and return its overload.

    ``fake`` and ``flops`` receive the call's arguments.
    """
    _library.define(name + signature)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"accel::{name}", fake, lib=_library)
    packet = getattr(torch.ops.accel, name)
    register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None, **kwargs: flops(*args, **kwargs))
    return packet.default


_library = torch.library.Library("accel", "FRAGMENT")


# --- autograd ---


def _autograd(
    name: str,
    args: Callable[..., A],
    reference: Callable[..., Any],
    layout: _Layout,
    forward_op: Any,
    backward_op: Any,
    gradients: int,
    always: int,
    lay_out: Callable[[Tensor, A], Tensor],
    upstream: int,
) -> Any:
    """The ``autograd.Function`` around the two ops of a declaration, whose first ``upstream`` outputs are used."""
    kept, sized, tensors, asks = layout.kept, layout.sized, layout.tensors, layout.asks
    results, kept_outputs = len(layout.outputs), layout.kept_outputs
    unused = [None] * (layout.differentiable_outputs - upstream)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(*given: Any) -> Any:
            return forward_op(*given)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            made = [output] if results == 1 else output
            if results > upstream:
                ctx.mark_non_differentiable(*made[upstream:])
            if upstream > 1:
                ctx.set_materialize_grads(False)
            ctx.save_for_backward(*[made[i] for i in kept_outputs], *[inputs[i] for i in kept])
            ctx.sizes = [[] if inputs[i] is None else list(inputs[i].shape) for i in sized]
            ctx.rest = inputs[tensors:]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = ctx.saved_tensors
            *rest, backend = ctx.rest
            needed = ctx.needs_input_grad
            fields: list[Any] = [None] * tensors
            for i, x in zip(kept, saved[len(kept_outputs) :], strict=True):
                fields[i] = x
            batched = transforms.batched()  # under jacrev, say, which runs the forward without
            if batched and not dispatch.OPS[name].straight_through:
                for i, size in zip(sized, ctx.sizes, strict=True):  # of which no gradient depends on the values
                    fields[i] = grads[0].new_zeros(size)
                return _through(reference, [*fields, *rest], grads[:upstream], needed)
            given = args(*fields, *rest)
            laid_out = [None if g is None else lay_out(g, given) for g in grads[:upstream]]
            needs = [list(needed[always:gradients])] if asks else []
            call = _plain(name) if batched else backward_op
            found = once_differentiable(name, call, *laid_out, *unused, *saved, *ctx.sizes, *rest, *needs, backend)
            pairs = zip([found] if gradients == 1 else found, fields, needed, strict=False)
            made = [_in_dtype_of(x, g) if wanted else None for g, x, wanted in pairs]
            return *made, *([None] * (len(needed) - gradients))

    return Recorded


def _plain(name: str) -> Callable[..., Any]:
    """The backward that the reference of an op has of its own, which ``torch.func`` batches."""
    backward: Any = dispatch.OPS[name].backend("reference").backward
    return lambda *given: backward(*given[:-1])


def _through(
    reference: Callable[..., Any], fields: Sequence[Any], grads: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients by plain torch, which ``torch.func`` batches, and differentiates again."""
    wanted = [i for i, needs in enumerate(needed) if needs]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(enumerate(fields)) | dict(zip(wanted, values, strict=True))
        with without_autocast(given[0]):
            found = reference(*given.values())
        return (found,) if isinstance(found, Tensor) else tuple(found[: len(grads)])

    made, pull, *_ = torch.func.vjp(outputs, *[fields[i] for i in wanted])
    found = pull(tuple([torch.zeros_like(x) if g is None else g for x, g in zip(made, grads, strict=True)]))
    gradients = dict(zip(wanted, found, strict=True))
    return tuple([gradients.get(i) for i in range(len(needed))])


def _in_dtype_of(x: Tensor | None, grad: Tensor) -> Tensor:
    """A gradient as autograd takes it; the call of ``to`` is spared where it would do nothing."""
    return grad if x is None or grad.dtype == x.dtype else grad.to(x.dtype)


def _beyond(name: str) -> str:
    """Where derivatives are that no kernel of the op ``name`` has."""
    if dispatch.OPS[name].straight_through:
        return "do not exist, not on backend='reference' either: its gradient is defined, not derived"
    return "exist only on backend='reference'"


def refuse_forward_mode(name: str, tensors: Iterable[Any]) -> None:
    """Kernels have no forward-mode derivative, and torch would take it for zero."""
    if forward_ad._current_level >= 0 and any(
        [isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors]
    ):
        raise NotImplementedError(f"{name}: forward-mode derivatives {_beyond(name)}")


def differentiated(op: str, arguments: Iterable[Any]) -> bool:
    """Whether autograd is to record a call of the kernels of ``op``."""
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    refuse_forward_mode(op, tensors)
    return requires_gradient(tensors)


def requires_gradient(arguments: Iterable[Any]) -> bool:
    """Whether a call with these has a backward. What a forward keeps for it, and what has none, is decided by this."""
    if not torch.is_grad_enabled():
        return False
    compiling = torch.compiler.is_compiling()
    return any([(_looked_at_anew(x) if compiling else x).requires_grad for x in arguments if isinstance(x, Tensor)])


class _Once(torch.autograd.Function):
    """Runs a backward and makes a second derivative an error instead of a silently missing term."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, backward: Callable[..., Any], mark: Tensor | None, *args: Any) -> Any:
        return backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{ctx.name}: its backward has no derivative of its own: second derivatives {_beyond(ctx.name)}"
        )


def once_differentiable(name: str, backward: Callable[..., Any], *args: Any) -> Any:
    """Call the backward of the op ``name`` from inside ``autograd.Function.backward``."""
    refuse_forward_mode(name, args)
    if not torch.is_grad_enabled():
        return backward(*args)
    # where roundings are passed by, a gradient depends on tensors that are kept as codes alone, outside of autograd
    mark = torch.zeros((), requires_grad=True) if dispatch.OPS[name].straight_through else None
    return _Once.apply(name, backward, mark, *args)


def _has_autocast(device: str) -> bool:
    return device != "meta"  # torch knows autocast of every other one


def autocast(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype that an enabled autocast asks for, as ``torch.matmul`` would see it; float64 stays."""
    device = x.device.type
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    if _has_autocast(device) and torch.is_autocast_enabled(device) and x.dtype in kinds:
        return x.to(torch.get_autocast_dtype(device))
    return x


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """For a reference, which computes in fp32 on purpose."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else contextlib.nullcontext()
