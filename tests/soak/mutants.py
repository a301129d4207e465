"""Checkpoints that are damaged, do not fit, or would run something when unpickled naively."""

import argparse
import builtins
import functools
import io
import operator
import os
import pickle
import random
import subprocess
import zipfile

import torch


def tiny(width=16):
    """A small model, its optimizer after a step, and what a run saves of them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, width), torch.nn.LayerNorm(width), torch.nn.Linear(width, 8))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(2, 12)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def content():
    """A run's checkpoint of it, in mid-epoch."""
    model, optimizer = tiny()
    meter = {"sums": {"loss": 1.5}, "counts": {"loss": 3.0}, "skipped": 0, "bad_in_a_row": 0}
    return {
        "model": model.state_dict(),
        "args": argparse.Namespace(lr=1e-3, opt_betas=[0.9, 0.95], resume=""),
        "optimizer": optimizer.state_dict() | {"names": [name for name, _ in model.named_parameters()]},
        "scaler": {},
        "epoch": 3,
        "step": 2,
        "samples_per_step": 4,
        "meter": meter,
    }


def as_bytes(value, **options):
    """A checkpoint file's bytes."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def regions(whole):
    """{what lies there: (from, to)} of a checkpoint file, in bytes."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries, directory = archive.infolist(), archive.start_dir
    spans, ends = {}, [entry.header_offset for entry in entries[1:]] + [directory]
    for entry, end in zip(entries, ends):
        extra = int.from_bytes(whole[entry.header_offset + 28 : entry.header_offset + 30], "little")
        start = entry.header_offset + 30 + len(entry.filename) + extra
        kind = "pickle" if entry.filename.endswith("data.pkl") else "tensor" if "/data/" in entry.filename else "other"
        spans.setdefault(kind, []).append((start, start + entry.file_size))
        spans.setdefault("header", []).append((entry.header_offset, start))
        spans.setdefault("after", []).append((start + entry.file_size, end))
    return spans | {"directory": [(directory, len(whole))]}


def flipped(whole, each, seed=0):
    """(name, bytes) with one to three bits turned over in tensors, pickle, headers, directory; `each` of every kind."""
    rng = random.Random(seed)
    for kind, spans in regions(whole).items():
        places = [place for start, end in spans for place in range(start, end)]
        for number in range(each):
            damaged = bytearray(whole)
            for _ in range(number % 3 + 1):
                damaged[rng.choice(places)] ^= 1 << rng.randrange(8)
            yield f"flip-{kind}-{number}.pth", bytes(damaged)


def truncated(whole, count, seed=0):
    """(name, bytes) cut at random places, and right behind the start and before the end."""
    rng = random.Random(seed)
    fixed = [0, 1, 4, 30, 100, len(whole) - 1, len(whole) - 2, len(whole) - 22, len(whole) - 23]
    for number in range(count):
        at = fixed[number] if number < len(fixed) else rng.randrange(len(whole))
        yield f"cut-{number}.pth", whole[:at]


# What does not fit ----------------------------------------------------------------------------------------------


def changed(path, value):
    """The checkpoint with the entry at `path` (keys, outermost first) replaced, or removed if `value` is None."""
    state = content()
    *outer, last = path
    place = functools.reduce(operator.getitem, outer, state)
    if value is None:
        del place[last]
    else:
        place[last] = value(place[last])
    return state


def wrong_weights():
    """(name, checkpoint) whose weights are those of another model; for load_strictly and restore."""
    names = list(content()["model"])
    reshaped = {
        "wider": lambda t: torch.zeros(*t.shape[:-1], t.shape[-1] + 1),
        "scalar": lambda t: t.sum(),
        "turned": lambda t: t[None],
        "empty": lambda t: t[:0],
        "twice": lambda t: torch.cat([t, t]),
    }
    for name in names:
        for kind, change in reshaped.items():
            yield f"{kind}-{name}", changed(("model", name), change)
        yield f"no-{name}", changed(("model", name), None)
        yield f"text-{name}", changed(("model", name), lambda t: "weights")
    yield "one-more", changed(("model",), lambda m: {**m, "head.weight": torch.zeros(3)})
    yield "no-weights", changed(("model",), lambda m: {})
    yield "weights-are-a-list", changed(("model",), lambda m: list(m.values()))


def wrong_run():
    """(name, checkpoint) whose weights fit, but nothing else does; for restore."""
    for key in ("optimizer", "epoch", "step", "samples_per_step", "meter"):
        yield f"no-{key}", changed((key,), None)
        yield f"{key}-is-text", changed((key,), lambda value: "text")
        yield f"{key}-is-a-list", changed((key,), lambda value: [1, 2])
    yield "no-scaler", changed(("scaler",), None)
    yield "negative-step", changed(("step",), lambda value: -1)
    yield "fewer-groups", changed(("optimizer", "param_groups"), lambda groups: [])
    yield "more-groups", changed(("optimizer", "param_groups"), lambda groups: groups * 2)
    yield (
        "fewer-parameters",
        changed(("optimizer", "param_groups"), lambda groups: [{**groups[0], "params": groups[0]["params"][:-1]}]),
    )
    yield "other-batch", changed(("samples_per_step",), lambda value: value + 1)
    for name in (0, 2, 4):
        for moment in ("exp_avg", "exp_avg_sq"):
            yield f"wider-{moment}-{name}", changed(("optimizer", "state", name, moment), lambda t: torch.zeros(99, 99))
    yield "model-is-missing", changed(("model",), None)


# What would run something ---------------------------------------------------------------------------------------


class Call:
    """Unpickled naively, this calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Built:
    """Unpickled naively, this makes a Namespace and then sets its state, which calls a function on the way."""

    def __init__(self, inner):
        self.inner = inner

    def __reduce__(self):
        return argparse.Namespace, (), {"lr": self.inner}


def attacks(target):
    """{name: object} each of which makes the file or folder `target` when it is unpickled naively."""
    target = str(target)
    write = f"open({target!r}, 'w').close()"
    return {
        "mkdir": Call(os.mkdir, target),
        "makedirs": Call(os.makedirs, target),
        "system": Call(os.system, f"touch {target}"),
        "popen": Call(os.popen, f"touch {target}"),
        "open": Call(builtins.open, target, "w"),
        "io-open": Call(io.open, target, "w"),
        "exec": Call(builtins.exec, write),
        "eval": Call(builtins.eval, write),
        "subprocess": Call(subprocess.check_call, ["touch", target]),
        "run": Call(subprocess.run, ["touch", target]),
        "partial": Call(functools.partial(os.mkdir, target)),
        "map": Call(list, Call(map, os.mkdir, [target])),
        "pickle": Call(pickle.loads, pickle.dumps(Call(os.mkdir, target))),
        "in-namespace": Built(Call(os.mkdir, target)),
        "namespace-subclass": argparse.Namespace(lr=Call(os.mkdir, target)),
    }


def poisoned(target):
    """(name, bytes): every attack at several places of a checkpoint, in every format that torch or pickle writes."""
    for name, attack in attacks(target).items():
        for place, value in {
            "bare": attack,
            "args": {**content(), "args": attack},
            "optimizer": changed(("optimizer", "param_groups"), lambda groups: [{"x": attack}]),
            "weight": {**content(), "model": {"0.weight": attack}},
        }.items():
            yield f"{name}-{place}-zip.pth", as_bytes(value)
            yield f"{name}-{place}-old.pth", as_bytes(value, _use_new_zipfile_serialization=False)
        for protocol in (0, 2, 4):
            yield f"{name}-pickle{protocol}.pth", pickle.dumps(attack, protocol)
