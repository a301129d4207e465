"""Probes: each as if it were trained alone, on an encoder that does not change; neighbours against numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from metrics import Task
from modeling_finetune import Size, VisionTransformer
from modeling_probe import AttentiveProbe, Features, LinearProbe, ProbedEncoder, ProbeLoss, nearest_neighbours
from optim_factory import Stepper, build_optimizer

TINY = Size(24, 2, 3, 24, 3)
SETTINGS = [(1e-2, 0.0), (1e-2, 0.3), (1e-3, 0.0), (0.1, 0.05)]  # learning rate, weight decay


def make_encoder(**kwargs):
    torch.manual_seed(0)
    encoder = VisionTransformer(TINY, num_classes=0, **kwargs)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder.double()


def make_batches(count=4):
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(5, 3, 4, 16, 32, generator=generator).double(), torch.randint(4, (5,), generator=generator))
        for _ in range(count)
    ]


def train_side_by_side(model, lr, weight_decay):
    """Through the optimizer and schedule of training, at a constant rate."""
    groups = model.parameter_groups(lr, weight_decay)
    optimizer, rates = build_optimizer(groups, "adamw", lr, (0.9, 0.999), 1e-8), (lambda _: lr, lambda _: weight_decay)
    stepper = Stepper(model, optimizer, torch.device("cpu"), "fp32", 1, *rates)
    model.train()
    for step, (clips, labels) in enumerate(make_batches()):
        stepper.schedule(step)
        loss = ProbeLoss(Task().losses)(model(clips), labels)
        stepper.backward(loss)
        stepper.step(loss.detach())


@pytest.mark.parametrize("kind, probe_class", [("linear", LinearProbe), ("attentive", AttentiveProbe)])
def test_probes_side_by_side_equal_each_trained_alone(kind, probe_class):
    """In double precision: Adam makes steps of the rounding errors of a gradient that is 0, as of the key bias."""
    model = ProbedEncoder(make_encoder(), 3, kind, 4, SETTINGS).double()
    start = [{key: value.clone() for key, value in probe.state_dict().items()} for probe in model.probes]
    train_side_by_side(model, 3e-3, 0.05)
    encoder = make_encoder().eval()
    for weights, (lr, weight_decay), together in zip(start, SETTINGS, model.probes):
        alone = probe_class(24, 3, 4).double()
        alone.load_state_dict(weights)
        optimizer = torch.optim.AdamW(alone.parameters(), lr, (0.9, 0.999), 1e-8, weight_decay)
        for clips, labels in make_batches():
            with torch.no_grad():
                tokens = encoder.forward_tokens(clips)
            F.cross_entropy(alone(tokens), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, value in together.state_dict().items():
            torch.testing.assert_close(value, alone.state_dict()[name], atol=1e-6, rtol=1e-6, msg=name)
    moved = [(probe.head.weight - weights["head.weight"]).abs().max() for probe, weights in zip(model.probes, start)]
    assert min(moved) > 1e-3 and (model.probes[0].head.weight - model.probes[1].head.weight).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_the_encoder_stays_as_it_was_and_in_eval_mode(kind):
    model = ProbedEncoder(make_encoder(drop_path_rate=0.5, drop_rate=0.5), 3, kind, 4, SETTINGS[:2]).double()
    before = {key: value.clone() for key, value in model.encoder.state_dict().items()}
    train_side_by_side(model, 3e-3, 0.05)
    assert all(torch.equal(value, before[key]) for key, value in model.encoder.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.encoder.parameters())
    assert model.training and model.probes.training and not any(m.training for m in model.encoder.modules())
    trained = {id(p) for group in model.parameter_groups(1e-3, 0.05) for p in group["params"]}
    assert trained == {id(p) for p in model.probes.parameters()}


def test_the_linear_probe_is_batchnorm_without_affine_and_a_linear_layer():
    torch.manual_seed(0)
    probe, tokens = LinearProbe(6, 3, 4), 3 * torch.randn(8, 5, 6) + 2
    assert {name for name, _ in probe.named_parameters()} == {"head.weight", "head.bias"}
    mean = tokens.mean(dim=1)
    normed = (mean - mean.mean(dim=0)) / (mean.var(dim=0, correction=0) + 1e-6).sqrt()
    by_hand = normed @ probe.head.weight.T + probe.head.bias
    torch.testing.assert_close(probe(tokens), by_hand, atol=1e-5, rtol=1e-5)
    probe.eval()  # now by what was seen in training: one batch, with the momentum of 0.1
    running = (mean - 0.1 * mean.mean(dim=0)) / (0.9 + 0.1 * mean.var(dim=0, correction=1) + 1e-6).sqrt()
    torch.testing.assert_close(probe(tokens), running @ probe.head.weight.T + probe.head.bias, atol=1e-5, rtol=1e-5)


def test_the_attentive_probe_by_hand():
    torch.manual_seed(0)
    probe, tokens = AttentiveProbe(12, 3, 4).eval(), torch.randn(2, 7, 12)
    with torch.no_grad():
        for name, parameter in probe.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm.weight" in name else 0.0))

    def norm(layer, x):
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias

    attention, by_hand = probe.attention, []
    (wq, wk, wv), (bq, bk, bv) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    for clip in tokens:
        clip = norm(probe.norm, clip)
        q, k, v = probe.query[0] @ wq.T + bq, clip @ wk.T + bk, clip @ wv.T + bv
        heads = [((q[:, p] @ k[:, p].T) / 2).softmax(dim=1) @ v[:, p] for p in (slice(0, 4), slice(4, 8), slice(8, 12))]
        pooled = torch.cat(heads, dim=1) @ attention.out_proj.weight.T + attention.out_proj.bias + probe.query[0]
        hidden = norm(probe.mlp_norm, pooled) @ probe.mlp.fc1.weight.T + probe.mlp.fc1.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        pooled = pooled + hidden @ probe.mlp.fc2.weight.T + probe.mlp.fc2.bias
        by_hand.append(norm(probe.head_norm, pooled[0]) @ probe.head.weight.T + probe.head.bias)
    torch.testing.assert_close(probe(tokens), torch.stack(by_hand), atol=1e-4, rtol=1e-4)


def test_logits_are_in_the_order_of_the_settings():
    """And the loss is the sum of the probes' own."""
    model, (clips, labels) = ProbedEncoder(make_encoder(), 3, "linear", 4, SETTINGS).double().eval(), make_batches(1)[0]
    with torch.no_grad():
        tokens, logits = model.encoder.forward_tokens(clips), model(clips)
    assert logits.shape == (5, 4, 4)
    for p, probe in enumerate(model.probes):
        torch.testing.assert_close(logits[:, p], probe(tokens))
    assert torch.equal(Features(model.encoder)(clips), tokens.mean(dim=1))
    expected = sum(F.cross_entropy(logits[:, p], labels) for p in range(4))
    torch.testing.assert_close(ProbeLoss(Task().losses)(logits, labels), expected)


def neighbours_by_hand(train, labels, test, k, num_classes):
    """One test video at a time, in numpy."""
    scores = np.zeros((len(test), num_classes))
    for row, query in zip(scores, test):
        cosine = np.array([query @ other / np.linalg.norm(query) / np.linalg.norm(other) for other in train])
        for index in np.argsort(-cosine)[:k]:
            row[labels[index]] += np.exp(cosine[index] / 0.07)
        row /= row.sum()
    return scores


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_neighbours_equal_numpy(k):
    rng = np.random.default_rng(0)
    train, test, labels = rng.normal(size=(60, 8)) * 5, rng.normal(size=(150, 8)), rng.integers(0, 6, 60)
    ours = nearest_neighbours(torch.from_numpy(train), torch.from_numpy(labels), torch.from_numpy(test), k, 6).numpy()
    assert ours.shape == (150, 6)
    np.testing.assert_allclose(ours, neighbours_by_hand(train, labels, test, k, 6), atol=1e-9)
    np.testing.assert_allclose(ours.sum(axis=1), 1)
