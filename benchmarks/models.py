"""Whole models on real pictures, patched against unpatched, and a training run with and without the patch."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import accel
from accel.benchmarks import _detectors
from accel.benchmarks._ceilings import Ceilings
from accel.benchmarks._machine import dtype_name, peak_memory
from accel.benchmarks._timing import Clock, Contender, Effort, measure
from accel.benchmarks._torchvision import allow_import
from accel.benchmarks.goals import Goal
from accel.benchmarks.harness import (
    OURS,
    Row,
    Short,
    UnavailableError,
    fill_timing,
    one_line,
    relative_rms,
)
from accel.testing import TOLERANCES

NAME = "models"
SHORT = Short(rivals=("eager",), cpu=(), cuda=())
BATCH, SIZE = 4, 224
CEILING = "core stubbed out"
TRAINING = "training step"

GOALS = (
    Goal(
        "swin_t forward, fp32, against unpatched",
        NAME,
        "speedup",
        "cpu",
        {"group": "torchvision swin_t", "mode": "forward", "dtype": "fp32"},
        "eager",
        1.08,
    ),
    Goal(
        "swin_t forward, bf16, against unpatched",
        NAME,
        "speedup",
        "cpu",
        {"group": "torchvision swin_t", "mode": "forward", "dtype": "bf16"},
        "eager",
        1.25,
    ),
    Goal(
        "swin_t training step, fp32, against unpatched",
        NAME,
        "speedup",
        "cpu",
        {"group": "torchvision swin_t", "mode": TRAINING, "dtype": "fp32"},
        "eager",
        1.05,
    ),
    *(
        Goal(
            f"swin_t training step, peak memory against unpatched ({device})",
            NAME,
            "memory",
            device,
            {"group": "torchvision swin_t", "mode": TRAINING},
            "eager",
            at_most=0.999,
        )
        for device in ("cpu", "cuda")
    ),
    Goal("digits: difference of the loss curves over the dtype's noise", NAME, "value", "cpu", at_most=3.0),
)
CURVES_GOAL = GOALS[-1].name


# --- real input ---


def photographs() -> Tensor:
    """Four photographs that ship inside scikit-image (or four crops of scikit-learn's two), ``(4, 3, 224, 224)``."""
    try:
        from skimage import data

        pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    except ImportError:
        try:
            from sklearn.datasets import load_sample_images
        except ImportError as error:
            raise UnavailableError(f"the photographs need scikit-image or scikit-learn: {error}") from None
        pictures = [part for image in load_sample_images().images for part in (image[:, :427], image[:, -427:])]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    batch = []
    for picture in pictures:
        x = torch.from_numpy(picture.copy()).float() / 255
        side = min(x.shape[:2])
        top, left = (x.shape[0] - side) // 2, (x.shape[1] - side) // 2
        x = (x[top : top + side, left : left + side] - mean) / std
        x = F.interpolate(x.permute(2, 0, 1)[None], (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        batch.append(x)
    return torch.cat(batch)


# --- models ---


def _need(module: str) -> Any:
    try:
        if module.startswith(("torchvision", "timm")):
            allow_import()
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} cannot be imported: {error}") from None


def _torchvision_swin() -> nn.Module:
    return _need("torchvision.models").swin_t(weights=None)


def _timm_swin() -> nn.Module:
    return _need("timm").create_model("swin_tiny_patch4_window7_224", pretrained=False)


def _transformers_swin() -> nn.Module:
    allow_import()
    transformers = _need("transformers")
    return transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=1000, drop_path_rate=0.0))


def _timm_vit() -> nn.Module:
    return _need("timm").create_model("vit_small_patch16_224", pretrained=False)


def _bert() -> nn.Module:
    allow_import()
    transformers = _need("transformers")
    config = transformers.BertConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048, num_labels=1000
    )
    return transformers.BertForSequenceClassification(config)


def _t5() -> nn.Module:
    allow_import()
    transformers = _need("transformers")
    return transformers.T5ForTokenClassification(transformers.T5Config(num_labels=10, dropout_rate=0.0))


def sentences() -> Tensor:
    """Token numbers ``(4, 512)``; the weights are random, so what they would spell makes no difference."""
    return torch.randint(1000, 30000, (BATCH, 512), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Model:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor] = photographs
    trains: bool = True
    shape: str = f"B{BATCH} {SIZE}×{SIZE}"
    detects: bool = False
    """A detector: its outputs are those of its queries, and it runs in fp32, since half precision picks others."""


MODELS = (
    Model("torchvision swin_t", _torchvision_swin),
    Model("timm swin_tiny", _timm_swin),
    Model("transformers Swin", _transformers_swin),
    Model("timm vit_small", _timm_vit),
    Model("transformers BERT, 4 layers of 512", _bert, sentences, shape=f"B{BATCH} T512"),
    Model("transformers T5-small encoder", _t5, sentences, trains=False, shape=f"B{BATCH} T512"),
    *(
        Model(f"transformers {name}", build, _detectors.photograph, trains=False, shape=_detectors.SHAPE, detects=True)
        for name, build in (("Deformable DETR", _detectors.deformable_detr), ("RT-DETR", _detectors.rt_detr))
    ),
)


def build(model: Model, seed: int) -> nn.Module:
    """Random weights, with bias tables and offsets large enough that a mistake in them shows in the output."""
    torch.manual_seed(seed)
    net = model.build().eval()
    if model.detects:
        return _detectors.enliven(net, model.inputs())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("relative_position_bias_table", "relative_attention_bias.weight")):
                parameter.normal_(std=0.5)
    return net


def _to(x: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return x.to(device, dtype if x.is_floating_point() else x.dtype)


def _logits(net: nn.Module, x: Tensor) -> Tensor:
    out = net(x)
    return out if isinstance(out, Tensor) else out.logits


def _stub(net: nn.Module) -> nn.Module | None:
    """``net`` with an attention core that costs nothing: projection, the v part, projection. torchvision's only."""
    found = False
    for module in net.modules():
        if type(module).__name__ == "ShiftedWindowAttention" and type(module).__module__.startswith("torchvision"):
            found = True

            def forward(x: Tensor, module: Any = module) -> Tensor:
                return module.proj(module.qkv(x)[..., 2 * x.shape[-1] :])

            module.forward = forward  # type: ignore[method-assign]
    return net if found else None


def _step(net: nn.Module, x: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Forward, loss, backward; the seed makes every contender drop the same paths."""
    torch.manual_seed(seed)
    net.zero_grad(set_to_none=True)
    loss = F.cross_entropy(_logits(net, x).float(), labels)
    loss.backward()
    return loss.detach()


def _results(
    net: nn.Module, x: Tensor, labels: Tensor, training: bool, seed: int, detects: bool = False
) -> list[Tensor]:
    """Logits, or what a detector finds; or, of a training step, the loss, all gradients as one vector, and those of
    the attention alone."""
    if not training:
        with torch.no_grad():
            return _detectors.outputs(net, x) if detects else [_logits(net, x)]
    loss = _step(net, x, labels, seed)
    named = [(n, p.grad.flatten()) for n, p in net.named_parameters() if p.grad is not None]
    attention = [g for n, g in named if "relative_position_bias_table" in n or ".attn." in n or ".attention." in n]
    net.zero_grad(set_to_none=True)
    return [loss.reshape(1), torch.cat([g for _, g in named]), torch.cat(attention)]


JUDGED = ("output or loss", "gradients", "gradients of attention")
FOUND = ("hidden states", "logits", "boxes")


def _judge(found: list[float], plain: list[float], dtype: torch.dtype, names: Sequence[str] = JUDGED) -> str:
    """Why a patched model is wrong: it may be no further from float64 than twice the unpatched one, plus one op's
    tolerance, since through twelve layers every kernel's rounding is carried along."""
    for what, mine, theirs in zip(names, found, plain, strict=False):
        limit = 2 * theirs + TOLERANCES["softmax_grad", dtype].rms
        if not mine <= limit:
            return f"{what}: relative RMS error {mine:.2e} > {limit:.2e} (unpatched: {theirs:.2e})"
    return ""


def model_rows(
    model: Model,
    dtype: torch.dtype,
    mode: str,
    *,
    device: str,
    clock: Clock,
    effort: Effort,
    ceilings: Ceilings,
    seed: int,
    say: Callable[[str], None],
    command: Callable[[Row], str],
    ceiling: bool = True,
) -> list[Row]:
    """Patched and unpatched, proven equal and then timed together; with ``ceiling`` also with the core stubbed out."""
    training = mode == TRAINING
    names = [OURS, "eager", *([CEILING] if ceiling and model.name.startswith("torchvision") else [])]
    rows = {n: Row(NAME, model.name, "", model.shape, dtype_name(dtype), mode, device, n) for n in names}
    for row in rows.values():
        row.command = command(row)
    label = f"{model.name} {dtype_name(dtype)} {mode}"
    try:
        say(f"{label}: built")
        plain = build(model, seed).to(device, dtype)
        plain.train(training)
        x = _to(model.inputs(), device, dtype)
        labels = torch.arange(BATCH, device=device)
    except UnavailableError as error:
        for row in rows.values():
            row.status, row.reason = "unavailable", one_line(error)
        return list(rows.values())

    nets: dict[str, nn.Module] = {"eager": plain}
    patched = copy.deepcopy(plain)
    report = None
    try:
        report = accel.patch(patched)
        nets[OURS] = patched
    except Exception as error:  # shown as the row's result; the other rows go on
        rows[OURS].status, rows[OURS].reason = "FAIL", one_line(error)
    if CEILING in rows:
        stub = _stub(copy.deepcopy(plain))
        if stub is None:
            rows[CEILING].status, rows[CEILING].reason = "unavailable", "no ShiftedWindowAttention in the model"
        else:
            nets[CEILING] = stub

    say(f"{label}: against float64")
    exact = _results(
        copy.deepcopy(plain).double(), _to(x, device, torch.float64), labels, training, seed, model.detects
    )
    errors = {}
    for name in [n for n in ("eager", OURS) if n in nets]:
        got = _results(nets[name], x, labels, training, seed, model.detects)
        errors[name] = [relative_rms(a, e) for a, e in zip(got, exact, strict=True)]
        rows[name].error = max(errors[name])
    if report is not None:
        rows[OURS].calls = sum(row.calls for row in report.rows)
        rows[OURS].backend = ", ".join(sorted({row.backend for row in report.rows if row.backend}))
        reason = _judge(errors[OURS], errors["eager"], dtype, FOUND if model.detects else JUDGED)
        if not reason and report.uncalled():
            reason = f"patched but never called: {', '.join(report.uncalled())}"
        if reason:
            rows[OURS].status, rows[OURS].reason = "FAIL", reason
            del nets[OURS]
    del exact

    def contender(name: str, net: nn.Module) -> Contender:
        if training:
            return Contender(name, lambda: _step(net, x, labels, seed), lambda: net.zero_grad(set_to_none=True))

        def forward() -> Tensor:
            with torch.no_grad():
                return _logits(net, x)

        return Contender(name, forward)

    contenders = [contender(name, nets[name]) for name in names if name in nets]
    for c in contenders:
        clock.warm(c)  # what is cached at a first call belongs to no call's peak
        if c.prepare is not None:
            c.prepare()
        rows[c.name].peak_mib = peak_memory(c.call, device)
    say(f"{label}: timing")
    for name, timing in measure(contenders, clock, effort, device).items():
        fill_timing(rows[name], timing, None, ceilings)
    rows_out = list(rows.values())
    if CEILING in rows:
        rows[CEILING].reason = rows[CEILING].reason or "what a core that costs nothing would give"
    return rows_out


def jobs(dtypes: Sequence[torch.dtype], every: bool) -> Iterator[tuple[Model, torch.dtype, str]]:
    """Forward in each dtype, a training step in fp32. Without ``every`` torchvision's Swin and, where transformers is
    installed, the detectors, fp32 before other dtypes."""
    detectors = importlib.util.find_spec("transformers") is not None
    known = [m for m in MODELS if every or m is MODELS[0] or (detectors and m.detects)]
    for dtype in sorted(dtypes, key=lambda dtype: dtype != torch.float32):
        for model in known:
            if dtype == torch.float32 or not model.detects:
                yield model, dtype, "forward"
            if dtype == torch.float32 and model.trains:
                yield model, dtype, TRAINING


# --- training on digits ---


@dataclass(frozen=True)
class Curves:
    """Losses of the same training run without and with the patch, and of runs whose weights began one unit in the
    last place away: how far apart two runs come that differ by rounding alone."""

    eager: list[float]
    patched: list[float]
    perturbed: list[list[float]]
    accuracy: dict[str, float]

    @property
    def difference(self) -> float:
        return _apart(self.eager, self.patched)

    @property
    def noise(self) -> float:
        return max(_apart(self.eager, other) for other in self.perturbed)


def _apart(a: Sequence[float], b: Sequence[float]) -> float:
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)


def _digits_swin(seed: int) -> nn.Module:
    """Two stages on 8×8 maps, window 4, every second block shifted."""
    swin = _need("torchvision.models.swin_transformer")
    torch.manual_seed(seed)
    return swin.SwinTransformer(
        patch_size=[1, 1],
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
        num_classes=10,
    )


def _perturb(net: nn.Module, seed: int) -> None:
    """Move every weight by one unit in the last place, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            up = torch.rand(p.shape, generator=generator) < 0.5
            p.copy_(torch.where(up, torch.nextafter(p, p + 1), torch.nextafter(p, p - 1)))


def _train(net: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, tick: Callable[[], None]) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for _ in range(steps):
        pick = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(net(x[pick]), y[pick])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        tick()
    return losses


def digits(steps: int, seed: int, tick: Callable[[], None] = lambda: None) -> Curves:
    """Train a small Swin on scikit-learn's digits four times: plain, patched, and twice plain but one ulp away."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UnavailableError(f"the digits need scikit-learn: {error}") from None
    data = load_digits()
    x = torch.from_numpy(data.images).float().div(16).sub(0.3)[:, None].repeat(1, 3, 1, 1)
    y = torch.from_numpy(data.target).long()
    held = torch.arange(len(x)) % 5 == 0
    losses: dict[str, list[float]] = {}
    accuracy: dict[str, float] = {}
    for name in ("eager", "patched", "ulp 1", "ulp 2"):
        net = _digits_swin(seed)
        if name == "patched":
            report = accel.patch(net)
        elif name.startswith("ulp"):
            _perturb(net, int(name[-1]))
        losses[name] = _train(net, x[~held], y[~held], steps, seed, tick)
        with torch.no_grad():
            accuracy[name] = (net.eval()(x[held]).argmax(1) == y[held]).float().mean().item()
    if report.uncalled():
        raise RuntimeError(f"patched but never called: {', '.join(report.uncalled())}")
    return Curves(losses["eager"], losses["patched"], [losses["ulp 1"], losses["ulp 2"]], accuracy)


def noise_ratio(curves: Curves) -> float:
    """The curves' difference in units of the noise between runs that differ by rounding alone."""
    return curves.difference / curves.noise if curves.noise else (0.0 if curves.difference == 0 else math.inf)
