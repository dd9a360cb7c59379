"""How a patched method reads its arguments: what the class does not read is not read, and the rest is its affair."""

import functools

import pytest
import torch
from torch import nn

import accel
from accel.patches import TABLE, Entry, class_path
from accel.patches.entry import accepts_any_call


class PassesOver(nn.Module):
    def forward(self, x, scale=1.0, **others):
        return x * scale


class Reads(nn.Module):
    def forward(self, x, scale=1.0, **others):
        return x * scale + others.get("shift", 0.0)


class ReadsLater(nn.Module):
    def forward(self, x, scale=1.0, **others):
        def shift():
            return others.get("shift", 0.0)

        return x * scale + shift()


class HandsOn(nn.Module):
    def forward(self, x, scale=1.0, **others):
        return Reads.forward(self, x, scale, **others)


def renaming(function):
    @functools.wraps(function)
    def renamed(self, *args, **kwargs):
        return function(self, *args, **kwargs) + kwargs.get("shift", 0.0)

    return renamed


class Decorated(nn.Module):
    @renaming
    def forward(self, x, scale=1.0, **others):
        return x * scale


class Newer(nn.Module):
    """A version of a library that has an argument more than the one that is known here."""

    def forward(self, x, scale=1.0, *, shift=0.0):
        return x * scale + shift


class Plain(nn.Module):
    def forward(self, x, scale=1.0):
        return x * scale


def scaled(module, attend, x, scale=1.0):
    return x * scale


def scaled_and_shifted(module, attend, x, scale=1.0, **others):
    return x * scale + others.get("shift", 0.0)


def patched(monkeypatch, cls, compute=scaled):
    target = class_path(cls)
    monkeypatch.setitem(TABLE, target, Entry(target, "forward", accepts_any_call, compute))
    module = cls()
    (row,) = accel.patch(module).rows
    return module, row


X = torch.ones(2)


def test_what_the_class_passes_over_is_passed_over(monkeypatch):
    module, row = patched(monkeypatch, PassesOver)
    assert torch.equal(module(X, 2.0, decoder_input_ids=X, token_type_ids=None), 2 * X)
    assert torch.equal(module(x=X, scale=2.0, shift=1.0), 2 * X)
    assert (row.calls, row.fallbacks) == (2, {})


@pytest.mark.parametrize("cls", [Reads, ReadsLater, HandsOn, Decorated, Newer])
def test_what_the_class_reads_and_we_do_not_know_goes_to_the_class(cls, monkeypatch):
    module, row = patched(monkeypatch, cls)
    assert torch.equal(module(X, 2.0, shift=1.0), 2 * X + 1)
    assert (row.calls, row.fallbacks) == (0, {"shift is given, which is not known here": 1})
    assert torch.equal(module(X, 2.0), 2 * X)
    assert row.calls == 1


def test_an_entry_that_takes_everything_is_given_everything(monkeypatch):
    module, row = patched(monkeypatch, Reads, scaled_and_shifted)
    assert torch.equal(module(X, 2.0, shift=1.0), 2 * X + 1)
    assert (row.calls, row.fallbacks) == (1, {})


def test_wrong_calls_get_the_classs_own_error(monkeypatch):
    module, row = patched(monkeypatch, Plain)
    with pytest.raises(TypeError, match=r"Plain\.forward\(\) got an unexpected keyword argument 'shift'"):
        module(X, shift=1.0)
    with pytest.raises(TypeError, match=r"Plain\.forward\(\) got multiple values for argument 'x'"):
        module(X, x=X)
    with pytest.raises(TypeError, match=r"Plain\.forward\(\) takes from 2 to 3 positional arguments but 4 were given"):
        module(X, 1.0, 2.0)
    assert row.fallbacks == {
        "shift is given, which the class does not take": 1,
        "an argument is given twice": 1,
        "it is given 3 arguments, and takes 2": 1,
    }


def test_it_compiles_with_what_is_passed_over(monkeypatch):
    module, row = patched(monkeypatch, PassesOver)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X, scale=2.0, decoder_input_ids=X), 2 * X)
    assert row.replacement.compiled
