"""Wanda and SparseGPT beside the mathematics of their authors' code in torch, on random kernels and those of a layer.

Written from what locuslab/wanda (`lib/prune.py`, `lib/layerwrapper.py`) and IST-DASLab/sparsegpt (`sparsegpt.py`)
compute, with the same Hessian for both.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.compress import calibrate, prune, sparsegpt
from gptjax.optim import sparsity as sparsity_lib

torch = pytest.importorskip("torch", reason="the authors' code is in torch")


def wanda(weights, hessian, sparsity):
    """`|w|` times the root of the mean square of the input, lowest first, in each row or in each group of it."""
    score = weights.abs() * torch.diagonal(hessian).sqrt()
    removed = torch.zeros_like(weights, dtype=torch.bool)
    if sparsity.group is None:
        lots = [(0, weights.shape[1], int(weights.shape[1] * sparsity.fraction))]
    else:
        lots = [(i, i + sparsity.group, sparsity.num_pruned) for i in range(0, weights.shape[1], sparsity.group)]
    for start, end, num in lots:
        lowest = torch.sort(score[:, start:end], dim=1, stable=True).indices[:, :num]
        removed[:, start:end].scatter_(1, lowest, True)
    return weights.masked_fill(removed, 0.0)


def published_sparsegpt(weights, hessian, sparsity, *, block=128, damping=0.01):
    """Columns of a block one after another, the rest of the matrix after each block."""
    weights, hessian = weights.clone(), hessian.clone()
    dead = torch.diagonal(hessian) == 0
    hessian[dead, dead] = 1
    weights[:, dead] = 0
    hessian += damping * torch.diagonal(hessian).mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, weights.shape[1], block):
        end = min(start + block, weights.shape[1])
        own, own_upper = weights[:, start:end].clone(), upper[start:end, start:end]
        errors, removed = torch.zeros_like(own), torch.zeros_like(own, dtype=torch.bool)
        if sparsity.group is None:
            cost = own**2 / torch.diagonal(own_upper) ** 2
            removed = cost <= torch.sort(cost.flatten()).values[int(cost.numel() * sparsity.fraction)]
        for i in range(end - start):
            if sparsity.group is not None and i % sparsity.group == 0:
                lot = slice(i, i + sparsity.group)
                cost = own[:, lot] ** 2 / torch.diagonal(own_upper)[lot] ** 2
                lowest = torch.topk(cost, sparsity.num_pruned, dim=1, largest=False).indices
                removed[:, lot] = torch.zeros_like(cost, dtype=torch.bool).scatter(1, lowest, True)
            kept = own[:, i].masked_fill(removed[:, i], 0.0)
            errors[:, i] = (own[:, i] - kept) / own_upper[i, i]
            own[:, i:] -= errors[:, i : i + 1] * own_upper[i : i + 1, i:]
            own[:, i] = kept
        weights[:, start:end] = own
        weights[:, end:] -= errors @ upper[start:end, end:]
    return weights


def output_error(changed, weights, hessian):
    change = np.asarray(changed, np.float64) - weights
    return np.einsum("ri,ij,rj->", change, hessian.astype(np.float64), change)


def inputs_of(hessian):
    return calibrate.Inputs(hessian, np.zeros(len(hessian)), np.zeros(len(hessian)), np.float32(1.0), hessian)


def correlated(rng, rows, size):
    x = rng.normal(size=(rows, size)) @ (np.eye(size) + 0.5 * rng.normal(size=(size, size)) / np.sqrt(size))
    x = x * rng.lognormal(sigma=1.0, size=size)
    return (x.T @ x).astype(np.float32)


@pytest.fixture(scope="module")
def real_layer(shared_data):
    """`(rows, hessian)` of kernels of the third layer of a trained model, on a story."""
    model = gptjax.load(shared_data / "models" / "stories260K" / "stories260K.bin")
    story = (shared_data / "text" / "tinystories" / "tinystories_sample.txt").read_text()
    tokens = np.asarray(model.tokenizer.encode(story)[:1024], np.int32).reshape(8, 128)
    found = {}

    def treat(site, kernel, inputs):
        if site.layer == 2 and site.path.endswith(("out/kernel", "down/kernel")):
            rows = site.layout.to_rows(kernel)
            found[site.path] = np.array(rows).reshape(-1, rows.shape[-1]), np.array(inputs.hessian)
        return kernel

    calibrate.walk(model.config, model.params, [jnp.asarray(tokens)], treat, sequence="none")
    return list(found.values())


def check(rows, hessian, sparsity):
    both = torch.from_numpy(rows), torch.from_numpy(hessian)
    ours = np.asarray(prune.by_inputs(rows, inputs_of(hessian), sparsity))
    np.testing.assert_array_equal(ours, wanda(*both, sparsity).numpy())
    ours = np.asarray(sparsegpt.prune(rows, hessian, sparsity, config=sparsegpt.PUBLISHED))
    theirs = published_sparsegpt(*both, sparsity).numpy()
    # Theirs removes the weight at the threshold of a block too; else only near ties are decided otherwise.
    assert np.mean((ours == 0) != (theirs == 0)) < 0.005
    assert output_error(ours, rows, hessian) == pytest.approx(output_error(theirs, rows, hessian), rel=0.01)
    assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(rows)


@pytest.mark.parametrize("text", ["0.7", "2:4", "4:8"])
def test_a_random_kernel_is_pruned_as_the_authors_do(text):
    rng = np.random.default_rng(0)
    hessian = correlated(rng, 600, 320)
    hessian[7], hessian[:, 7] = 0, 0
    check(rng.normal(size=(96, 320)).astype(np.float32), hessian, sparsity_lib.parse(text))


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_a_trained_layer_is_pruned_as_the_authors_do(real_layer, text):
    for rows, hessian in real_layer:
        check(rows, hessian, sparsity_lib.parse(text))
