"""Ways to copy a model, for tests that a copy is patched and stands alone."""

import copy
import io
import pickle

import torch


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DUPLICATES = [copy.deepcopy, pickled, saved]
