"""Schedules, parameter groups, layer decay against tables; the step: accumulation, clipping, precision, overflow."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn as nn

from meters import RunLog, StepMeter
from modeling_finetune import Size, VisionTransformer, vit_base_patch16_224
from modeling_pretrain import pretrain_videomae_small_patch16_224
from optim_factory import Stepper, build_optimizer, cosine_schedule, parameter_groups

CPU = torch.device("cpu")


# Groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, plain",
    [
        (pretrain_videomae_small_patch16_224, ["mask_token", "encoder.blocks.3.attn.q_bias"]),
        (vit_base_patch16_224, ["fc_norm.weight"]),
    ],
)
def test_every_parameter_is_in_one_group_and_matrices_alone_decay(build, plain):
    """Rates and decay of each parameter of ViT-B are in test_engine_for_finetuning.py."""
    with torch.device("meta"):
        model = build()
    groups = parameter_groups(model, 0.05)
    found = {name: group for group in groups for name in group["names"]}
    assert len(groups) == 2 and sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = found[name]
        assert any(parameter is other for other in group["params"]) and group["lr_scale"] == 1
        bare = parameter.ndim == 1 or name.endswith(".bias") or name == "mask_token"
        assert (group["weight_decay"], group["wd_scale"]) == ((0, 0) if bare else (0.05, 1)), name
    assert not any(found[name]["weight_decay"] for name in plain)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert sorted(name for group in parameter_groups(model, 0.1) for name in group["names"]) == ["1.bias", "1.weight"]


# Optimizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opt", ["adan", "adahessian", "none"])
def test_optimizers_that_cannot_be_used(opt):
    with pytest.raises(ValueError, match=f"^opt {opt}: "):
        build_optimizer(parameter_groups(nn.Linear(3, 2), 0.05), opt, 1e-3)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb", "lion", "nadamw", "adafactor", "momentum"])
def test_optimizers_by_name(opt):
    groups = parameter_groups(nn.Linear(3, 2), 0.05)
    optimizer = build_optimizer(groups, opt, 1e-3, (0.9, 0.95), 1e-8)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0, 0.05]
    assert all("lr_scale" in group for group in optimizer.param_groups)
    if opt == "adamw":
        assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
        assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.95), 1e-8)}
    with pytest.raises(ValueError, match=f"{opt}x"):
        build_optimizer(groups, f"{opt}x", 1e-3)


# Steps ----------------------------------------------------------------------------------------------------------


def constant(value):
    return lambda step: value


def make(opt="adamw", update_freq=1, precision="fp32", weight_decay=0.05, clip_grad=None, width=5, schedules=None):
    """A stepper around a small network; `schedules`: lr and weight decay by step, else constant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, 1))
    optimizer = build_optimizer(parameter_groups(model, weight_decay), opt, 1e-2, (0.9, 0.95), 1e-8)
    lr, decay = schedules or (constant(1e-2), constant(weight_decay))
    return Stepper(model, optimizer, CPU, precision, update_freq, lr, decay, clip_grad)


def run(stepper, batches, step=0):
    """One optimizer step on a list of (x, y); what it returns."""
    stepper.schedule(step)
    losses = []
    for micro_batch, (x, y) in enumerate(batches):
        with stepper.sync(micro_batch), stepper.autocast():
            loss = nn.functional.mse_loss(stepper.model(x).float(), y)
        stepper.backward(loss)
        losses.append(loss.detach())
    return stepper.step(torch.stack(losses).mean())


def data(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randn(count, 1, generator=generator)


def weights(stepper):
    return copy.deepcopy(stepper.model.state_dict())


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("opt", ["adamw", "lamb", "sgd"])
@pytest.mark.parametrize("clip_grad", [None, 0.05])
def test_accumulating_two_halves_is_one_batch(opt, clip_grad):
    whole, halves = (make(opt, update_freq=n, clip_grad=clip_grad) for n in (1, 2))
    for step in range(5):
        x, y = data(8, step)
        norm = run(whole, [(x, y)])["grad_norm"]
        assert run(halves, [(x[:4], y[:4]), (x[4:], y[4:])])["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(halves)[name], value, atol=1e-6, rtol=1e-4)


def test_adamw_with_schedules_is_the_formula():
    """Five steps of decoupled weight decay, bias correction and all, by hand in double precision."""
    rates, decays = [0.0, 0.01, 0.02, 0.01, 0.005], [0.0, 0.1, 0.2, 0.3, 0.4]
    stepper = make(weight_decay=0.0, schedules=(lambda step: rates[step], lambda step: decays[step]))
    x, y = data(6)
    name, first = "0.weight", weights(stepper)["0.weight"].double()
    p, m, v = first.clone(), torch.zeros_like(first), torch.zeros_like(first)
    for step in range(5):
        model = copy.deepcopy(stepper.model)
        nn.functional.mse_loss(model(x), y).backward()
        g = dict(model.named_parameters())[name].grad.double()
        p = p * (1 - rates[step] * decays[step])
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        t = step + 1
        p = p - rates[step] * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        run(stepper, [(x, y)], step)
        torch.testing.assert_close(weights(stepper)[name].double(), p, atol=2e-6, rtol=1e-4)


def test_a_decay_that_was_0_for_a_while_comes_back():
    stepper = make(schedules=(lambda step: 0.1 * step, lambda step: 0.3 - 0.1 * step))
    assert stepper.schedule(2) == {"lr": pytest.approx(0.2), "weight_decay": pytest.approx(0.1)}
    stepper.schedule(3)
    stepper.schedule(1)
    assert {round(group["weight_decay"], 6) for group in stepper.optimizer.param_groups} == {0, 0.2}


def test_clipping():
    x, y = data(8)
    free, clipped, loose = (make("momentum", weight_decay=0.0, clip_grad=norm) for norm in (None, 0.01, 1e6))
    before, model = weights(free), copy.deepcopy(free.model)
    nn.functional.mse_loss(model(x), y).backward()
    expected = sum(float(p.grad.double().pow(2).sum()) for p in model.parameters()) ** 0.5
    norms = [float(run(stepper, [(x, y)])["grad_norm"]) for stepper in (free, clipped, loose)]
    assert norms[0] == norms[1] == norms[2] == pytest.approx(expected, rel=1e-6) and expected > 0.05  # before clipping
    steps = [torch.cat([(weights(s)[name] - before[name]).flatten() for name in before]) for s in (free, clipped)]
    ratio = steps[1].norm() / steps[0].norm()
    assert ratio == pytest.approx(0.01 / norms[0], rel=0.05) and equal(weights(free), weights(loose))
    assert nn.functional.cosine_similarity(*steps, dim=0) > 0.999


# Bad gradients --------------------------------------------------------------------------------------------------


def state_of(stepper):
    return copy.deepcopy(stepper.optimizer.state_dict()["state"])


def same_state(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[key][name]), torch.as_tensor(other[key][name]))
        for key in one
        for name in one[key]
        if one[key][name] is not None
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "opt, clip_grad",
    [("adamw", None), ("adamw", 1.0), ("sgd", None), ("lamb", None), ("lion", 1.0), ("momentum", None)],
)
def test_a_bad_step_changes_nothing(opt, clip_grad, poison):
    stepper, (x, y) = make(opt, clip_grad=clip_grad, update_freq=2), data(4)
    for step in range(3):
        assert run(stepper, [data(4, step), data(4, step + 9)])["bad"] == 0
    before, state = weights(stepper), state_of(stepper)
    bad = torch.full_like(x, poison), y
    for order in ([(x, y), bad], [bad, (x, y)]):
        assert run(stepper, order)["bad"] == 1
        assert equal(weights(stepper), before) and same_state(state_of(stepper), state)
        assert all(p.grad is None for p in stepper.model.parameters())
    assert run(stepper, [(x, y)] * 2)["bad"] == 0 and not equal(weights(stepper), before)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb", "lion"])
def test_a_bad_first_step_leaves_no_trace(opt):
    """The optimizer's state is made in the first step: it must not hold what happened to be in memory."""
    width = 3000
    stepper, fresh = make(opt, width=width), make(opt, width=width)
    x, y = data(4)
    for shape in [(width, 4), (width,), (1, width), (1,)] * 4:
        torch.full(shape, 1e30)  # memory that is given back, and likely to be taken next
    assert run(stepper, [(x * float("nan"), y)])["bad"] == 1
    for step in range(2):
        run(stepper, [(x, y)], step)
        run(fresh, [(x, y)], step)
    assert equal(weights(stepper), weights(fresh))


# Precision ------------------------------------------------------------------------------------------------------


def test_precision_of_the_forward_pass():
    x, y = data(4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        stepper = make(precision=precision)
        with stepper.autocast():
            assert stepper.model(x).dtype == dtype
        assert run(stepper, [(x, y)])["bad"] == 0 and not stepper.scaler.is_enabled()
        assert {value.dtype for value in weights(stepper).values()} == {torch.float32}


def test_fp16_scales_the_loss_and_reports_unscaled_norms():
    x, y = data(64)
    exact, half = make(), make(precision="fp16")
    half.scaler.scale(torch.zeros(1))  # makes the scale, 2 ** 16
    norms = [float(run(stepper, [(x, y)])["grad_norm"]) for stepper in (exact, half)]
    assert norms[1] == pytest.approx(norms[0], rel=0.02) and half.scaler.get_scale() == 2**16


def test_an_overflow_in_fp16_lowers_the_scale_and_does_no_harm():
    stepper, (x, y) = make(precision="fp16"), data(4)
    meter = StepMeter(RunLog("", ""), CPU, 0, 1, 3)
    for step, scale in enumerate((1, 1e5, 1)):  # gradients beyond fp16's 65504 once scaled
        before, state = weights(stepper), state_of(stepper)
        shown = run(stepper, [(x, y * scale)])
        assert stepper.scaler.get_scale() == (2**16 if step == 0 else 2**15) and shown["bad"] == 0
        assert step != 1 or (equal(weights(stepper), before) and same_state(state_of(stepper), state))
        meter.update(step, {"loss": torch.ones(()), **shown}, ["x"])
    assert meter.averages()["skipped_steps"] == 0
    json.dumps(meter.averages(), allow_nan=False)  # one overflow must not hide the epoch's gradient norm


def test_options_of_the_optimizer_are_those_of_the_command_line(tmp_path):
    """Averages go on parameter by parameter, however --layer_decay groups them; betas, epsilon and scales are new."""

    def build(decay, betas, eps):
        torch.manual_seed(0)
        model = VisionTransformer(Size(8, 2, 2, 8, 2), num_classes=3, init_scale=1.0)
        optimizer = build_optimizer(parameter_groups(model, 0.05, decay), "adamw", 1e-2, betas, eps)
        return Stepper(model, optimizer, CPU, "fp32", 1, constant(1e-2), constant(0.05))

    def learn(stepper):
        clips = torch.randn(2, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
        stepper.schedule(0)
        stepper.backward(stepper.model(clips).square().sum())
        stepper.step(torch.ones(()))
        states = {name: stepper.optimizer.state[value] for name, value in stepper.model.named_parameters()}
        return {name: state["exp_avg"].clone() for name, state in states.items()}

    old = build(1.0, (0.9, 0.95), 1e-8)
    first = learn(old)
    torch.save(old.state(), tmp_path / "x.pth")
    for decay in (1.0, 0.75, 0.5):
        new = build(decay, (0.8, 0.99), 1e-3)  # its weights are those that `old` had: so will be its gradient
        options_of = lambda: [group | {"params": ()} for group in new.optimizer.state_dict()["param_groups"]]
        options = options_of()
        new.load(torch.load(tmp_path / "x.pth", weights_only=True), tmp_path / "x.pth")
        assert options_of() == options
        for name, average in learn(new).items():
            torch.testing.assert_close(average, 0.8 * first[name] + 0.2 * first[name] / 0.1, msg=name)


@pytest.mark.parametrize(
    "opt, precision",
    [*((opt, "fp32") for opt in ("adamw", "sgd", "momentum", "lamb", "lion", "novograd")), ("adamw", "fp16")],
)
def test_a_stepper_goes_on_exactly(opt, precision, tmp_path):
    """Through a file. Lamb counts its steps in the groups, NovoGrad has a scalar per weight, fp16 has a scaler."""
    one, other = make(opt, precision=precision), make(opt, precision=precision)
    for step in range(7):
        run(one, [data(4, step)])
    torch.save(one.state(), tmp_path / "x.pth")
    other.model.load_state_dict(weights(one))
    other.load(torch.load(tmp_path / "x.pth", weights_only=True), tmp_path / "x.pth")
    for step in range(7):
        for stepper in (one, other):
            run(stepper, [data(4, step)])
    assert equal(weights(one), weights(other)) and one.scaler.state_dict() == other.scaler.state_dict()


# Schedules ------------------------------------------------------------------------------------------------------


def recipe(base, final, epochs, steps_per_epoch, warmup_epochs=0, start=0.0, warmup_steps=None):
    """The schedule of MAE, VideoMAE and the released code: one value for every step of a run."""
    warmup_iters = warmup_epochs * steps_per_epoch if warmup_steps is None else warmup_steps
    iters = np.arange(epochs * steps_per_epoch - warmup_iters)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * iters / len(iters)))
    return np.concatenate([np.linspace(start, base, warmup_iters), cosine])


@pytest.mark.parametrize(
    "base, final, epochs, steps, warmup, start",
    [
        (1.5e-4, 1e-5, 801, 7, 40, 0.0),
        (1e-3, 1e-6, 10, 30, 5, 1e-6),
        (0.05, 0.05, 12, 3, 0, 0.0),
        (0.04, 0.4, 9, 11, 0, 0.0),
        (1.0, 0.0, 4, 1, 1, 0.25),
        (1.0, 0.5, 3, 5, 3, 0.0),
    ],
)
def test_cosine_schedule_is_that_of_the_recipe(base, final, epochs, steps, warmup, start):
    """And stays at its last value."""
    total = epochs * steps
    expected = recipe(base, final, epochs, steps, warmup, start)
    ours = [cosine_schedule(step, base, final, total, warmup * steps, start) for step in range(total)]
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-15)
    if warmup < epochs:
        assert {cosine_schedule(step, base, final, total, warmup * steps, start) for step in (total, 10**9)} == {final}
