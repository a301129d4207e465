"""Reading weights: nothing in a file is run, damage is noticed, names of others are known."""

import argparse
import math
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from checkpoints import save_checkpoint
from modeling_finetune import vit_tiny_patch16_224
from modeling_pretrain import pretrain_videomae_tiny_patch16_224
from utils import RunError
from weights import load_encoder, load_strictly, model_weights, read_checkpoint


def tiny(width=4):
    return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.LayerNorm(width))


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    model = tiny()
    args = argparse.Namespace(lr=1e-3, opt_betas=[0.9, 0.95], first_stage_path="", clip_grad=None)
    content = {"model": model.state_dict(), "epoch": 7, "args": args, "meter": {"sums": {"loss": 0.1}}}
    save_checkpoint(content, tmp_path / "x.pth")
    back = read_checkpoint(tmp_path / "x.pth")
    assert back["args"] == args and back["epoch"] == 7 and back["meter"] == content["meter"]
    assert all(torch.equal(back["model"][name], value) for name, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]  # no draft is left
    weights = model.state_dict()
    save_file(weights, tmp_path / "a.safetensors")
    torch.save({"model": weights}, tmp_path / "b.pth", _use_new_zipfile_serialization=False)  # the old format
    for name in ("a.safetensors", "b.pth"):
        back = model_weights(read_checkpoint(tmp_path / name))
        assert all(torch.equal(back[key], value) for key, value in weights.items())


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_would_run_something_is_refused(tmp_path):
    content = {"model": tiny().state_dict(), "args": Evil(tmp_path / "made")}
    torch.save(content, tmp_path / "zip.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Evil(tmp_path / "made"), protocol=2))
    for name in ("zip.pth", "old.pth", "bare.pth"):
        with pytest.raises(RunError, match=f"{name}: not a readable checkpoint") as error:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value) and not (tmp_path / "made").exists()
    pickle.loads((tmp_path / "bare.pth").read_bytes())
    assert (tmp_path / "made").exists()  # it would have


NUMBERS = [np.float64(0.1), np.float16(1.5), np.int32(-3), np.uint8(200), np.bool_(True), np.str_("é")]
NUMBERS += [np.dtype(">f4").type(2)]


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_are_read(tmp_path, zipped):
    content = {"model": tiny().state_dict(), "numbers": NUMBERS, "rng": np.random.get_state(), "type": np.dtype("i8")}
    content["best"] = {"acc1": np.float64(81.5)}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    back = read_checkpoint(tmp_path / "x.pth")
    assert back["numbers"] == NUMBERS and back["best"] == {"acc1": 81.5} and set(back["model"]) == set(content["model"])
    assert {type(number) for number in back["numbers"]} <= {float, int, bool, str}


def test_numbers_of_an_older_numpy_are_read(tmp_path):
    """NumPy 1 wrote ``numpy.core`` where NumPy 2 writes ``numpy._core``; both names are as long in the file's text."""
    text = pickle.dumps({"model": {}, "best": np.float64(81.5)}, protocol=2)
    text = text.replace(b"numpy._core.", b"numpy.core.")
    buffers = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
    old = b"".join(pickle.dumps(value, protocol=2) for value in buffers) + text + pickle.dumps([], protocol=2)
    (tmp_path / "x.pth").write_bytes(old)
    assert read_checkpoint(tmp_path / "x.pth")["best"] == 81.5


def test_what_is_refused_is_reported_with_a_remedy_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights, path = tiny().state_dict(), tmp_path / "x.pth"
    for name, value in (("pathlib.", Path("x")), ("argparse.Action", argparse.Namespace(a=argparse.Action("x", "y")))):
        torch.save({"model": weights, "args": value}, path)
        with pytest.raises(RunError, match=f"x.pth: not a readable checkpoint: it holds a {name}") as error:
            read_checkpoint(path)
        assert str(error.value).isprintable()  # no terminal codes, one line
        command = re.search(r'python -c "(.*)"', str(error.value))[1]
        exec(command, {})
        assert set(read_checkpoint(tmp_path / "weights.pth")["model"]) == set(weights)


def flip_a_bit(path, tensor):
    """Change one bit inside the stored values of a tensor."""
    content = bytearray(path.read_bytes())
    place = content.find(tensor.numpy().tobytes())
    assert place > 0
    content[place + 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed(tmp_path):
    model = tiny(64)
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    flip_a_bit(tmp_path / "x.pth", model[0].weight.detach())
    assert "model" in torch.load(tmp_path / "x.pth", weights_only=True)  # torch does not see it
    with pytest.raises(RunError, match="x.pth: damaged"):
        read_checkpoint(tmp_path / "x.pth")


def test_other_files_are_refused_in_one_line(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save({"model": tiny(64).state_dict()}, whole)
    bad = {
        "cut.pth": whole.read_bytes()[:-900],
        "empty.pth": b"",
        "text.pth": b"hello\nworld\n" * 30,
        "x.safetensors": b"\xff" * 40,
        "zeros.pth": bytes(3000),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({}, tmp_path / "nothing.pth")
    for name in (*bad, "list.pth", "nothing.pth", "missing.pth", "."):
        with pytest.raises(RunError) as error:
            read_checkpoint(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_not_what_their_name_says(tmp_path):
    weights = tiny(64).state_dict()
    save_file(weights, tmp_path / "tensors.safetensors")
    os.rename(tmp_path / "tensors.safetensors", tmp_path / "tensors.pth")
    assert set(read_checkpoint(tmp_path / "tensors.pth")["model"]) == set(weights)
    torch.save({"model": weights}, tmp_path / "cut.pth")
    os.truncate(tmp_path / "cut.pth", 900)
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    (tmp_path / "page.pth").write_text("\n<!DOCTYPE html><html><body>Google Drive - Virus scan warning</body></html>")
    remedies = {"cut": "copy or download it again", "pointer": "`git lfs pull`", "page": "asked for a login"}
    for name, remedy in remedies.items():
        with pytest.raises(RunError, match=f"{name}.pth: .*{remedy}"):
            read_checkpoint(tmp_path / f"{name}.pth")
    with pytest.raises(RunError, match="c.state_dict"):
        torch.save(tiny(), tmp_path / "model.pth")
        read_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
@pytest.mark.parametrize(
    "prefix",
    "module. _orig_mod. module._orig_mod. _orig_mod.module. _fsdp_wrapped_module. _checkpoint_wrapped_module.".split(),
)
def test_weights_are_found_under_usual_keys_without_prefixes(key, prefix):
    weights = {f"{prefix}{name}": value for name, value in tiny().state_dict().items()}
    found = model_weights({key: weights, "epoch": 3} if key else weights)
    assert set(found) == set(tiny().state_dict())


def test_compiled_parts_have_their_usual_names():
    model = tiny()
    model[0] = torch.compile(model[0])  # in the middle of names
    assert any("_orig_mod" in name for name in model.state_dict())
    assert set(model_weights({"model": model.state_dict()})) == set(tiny().state_dict())


def test_weights_under_a_key_of_their_own():
    with pytest.raises(RunError, match="here.pth: no weights"):
        model_weights({"epoch": 3, "args": {}}, "here.pth")
    weights, other = tiny().state_dict(), tiny().state_dict()
    checkpoint = {"teacher": weights, "model": other, "epoch": 3}
    for key in ("teacher", "nothing|teacher", "teacher|model"):
        assert all(torch.equal(value, weights[name]) for name, value in model_weights(checkpoint, key=key).items())
    del checkpoint["model"]
    for key, looked in (("", "model, module, state_dict, model_state"), ("techer", "techer")):
        said = rf"x.pth: no weights in it \(looked under {looked}\); --model_key .*teacher$"
        with pytest.raises(RunError, match=said):
            model_weights(checkpoint, "x.pth", key)


def test_load_strictly_loads_all(tmp_path, caplog):
    model, other = tiny(), tiny()
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    with caplog.at_level("INFO", "smile"):
        load_strictly(other, tmp_path / "x.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert f"loaded 4 tensors from {tmp_path / 'x.pth'}" in caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"0.weight": (5, 3)}, r"0.weight is \[5, 3\] in the checkpoint, \[4, 3\] in the model"),
        ({"1.bias": None}, r"1.bias is missing in the checkpoint"),
        ({"head.bias": (2,), "x": (1,)}, r"head.bias is not in the model \(and 1 m.*"),
    ],
)
def test_load_strictly_says_what_does_not_fit_and_changes_nothing(tmp_path, change, message):
    """`change`: new shapes; None: left out."""
    model = tiny()
    before = [value.clone() for value in model.state_dict().values()]
    weights = {key: value for key, value in tiny().state_dict().items() if change.get(key, ()) is not None}
    weights |= {name: torch.zeros(shape) for name, shape in change.items() if shape}
    torch.save({"model": weights}, tmp_path / "x.pth")
    with pytest.raises(RunError, match=f"x.pth does not fit this model: {message}; check --model"):
        load_strictly(model, tmp_path / "x.pth")
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))


# Loading an encoder ---------------------------------------------------------------------------------------------


def renamed(weights, prefix):
    """The same weights with a prefix."""
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize("prefix", ["", "model.", "encoder.", "backbone.", "videomae.", "net.model."])
def test_a_classifier_under_any_prefix(tmp_path, prefix):
    model, new = vit_tiny_patch16_224(num_classes=3), vit_tiny_patch16_224(num_classes=3)
    weights = renamed(model.state_dict(), prefix) | {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": weights}, tmp_path / "x.ckpt")
    load_encoder(new, tmp_path / "x.ckpt", need_head=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in new.state_dict().items())


def test_of_several_encoders_the_usual_one_or_the_chosen_one(tmp_path, caplog):
    student, teacher, new = (pretrain_videomae_tiny_patch16_224().encoder for _ in range(3))
    first = "blocks.0.attn.qkv.weight"
    for others in ("model.", "encoder.", "model.encoder."):
        both = renamed(student.state_dict(), others) | renamed(teacher.state_dict(), "ema." + others)
        torch.save(both, tmp_path / "x.pth")
        for prefix, wanted in ((others, student), ("ema.", teacher)):
            new = vit_tiny_patch16_224(num_classes=0)
            load_encoder(new, tmp_path / "x.pth", prefix=prefix)
            assert torch.equal(new.state_dict()[first], wanted.state_dict()[first])
    with pytest.raises(RunError, match=r"x.pth holds several encoders, model.encoder., ema.model.*--model_prefix"):
        load_encoder(new, tmp_path / "x.pth")


@pytest.mark.parametrize("load, where", [(load_encoder, "blocks.1.mlp.fc2.weight"), (load_strictly, "head.bias")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, load, where, value):
    weights = vit_tiny_patch16_224(num_classes=3).state_dict()
    weights[where].view(-1)[-1] = value
    torch.save({"model": weights}, tmp_path / "x.pth")
    with pytest.raises(RunError, match=f"x.pth: {where} has values that are NaN or infinite"):
        load(vit_tiny_patch16_224(num_classes=3), tmp_path / "x.pth")


def test_a_deeper_model_is_refused(tmp_path):
    weights = vit_tiny_patch16_224(num_classes=3).state_dict()
    last = {name: value for name, value in weights.items() if name.startswith("blocks.3.")}
    torch.save(weights | {name.replace(".3.", ".4.", 1): value for name, value in last.items()}, tmp_path / "x.pth")
    with pytest.raises(RunError, match="x.pth does not fit this model: blocks.4.norm1.weight is not in the model"):
        load_encoder(vit_tiny_patch16_224(num_classes=3), tmp_path / "x.pth")
