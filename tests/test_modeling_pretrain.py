"""The student against Hugging Face's VideoMAE with the same weights, against the released parameter names and shapes,
and against what a masked encoder must and must not see.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import VideoMAEConfig, VideoMAEForPreTraining
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from modeling_finetune import LayerNorm, Size, _positions, sinusoid_positions
from modeling_pretrain import MODELS, PretrainVisionTransformer, split_tokens, take_tokens
from modeling_teacher import PixelTarget

MINI = Size(embed_dim=48, depth=3, num_heads=4, decoder_embed_dim=24, decoder_num_heads=3)
# frames, height, width, hidden tokens
SHAPES = [(8, 64, 64, 51), (16, 32, 32, 24), (6, 32, 80, 22), (4, 96, 48, 5)]


def randomize(model):
    """No parameter stays at its initial, special value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return model.eval()


def random_student(**kwargs):
    return randomize(PretrainVisionTransformer(MINI, **{"decoder_depth": 2, "decoder_num_classes": 1536, **kwargs}))


def random_masks(rows, num_tokens, num_hidden, seed=0):
    """bool [rows, N], each row another choice."""
    order = torch.rand(rows, num_tokens, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order < num_hidden


def clip_and_mask(num_frames, height, width, num_hidden, batch=2):
    torch.manual_seed(1)
    clips = torch.randn(batch, 3, num_frames, height, width)
    return clips, random_masks(batch, num_frames // 2 * (height // 16) * (width // 16), num_hidden)


# -------------------------------------------------------------------------------------------------------- Hugging Face


# transformers 5 calls the biases in memory otherwise than in its files; before, both were called as ours are.
BIASES = {"q_bias": "query.bias", "v_bias": "value.bias"} if transformers.__version__ >= "5" else {}


def to_hugging_face(state):
    """Our parameter names → theirs."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("encoder.patch_embed.proj", "videomae.embeddings.patch_embeddings.projection")
        key = key.replace("encoder.blocks", "videomae.encoder.layer").replace("encoder.norm", "videomae.layernorm")
        key = key.replace("decoder.blocks", "decoder.decoder_layers")
        key = key.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        key = key.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        key = key.replace("attn.proj", "attention.output.dense").replace("attn.", "attention.attention.")
        if key.endswith("qkv.weight"):
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                renamed[key.replace("qkv", name)] = part
        else:
            module, dot, name = key.rpartition(".")
            renamed[module + dot + BIASES.get(name, name)] = value
    return renamed


def their_config(num_frames, height, width, **options):
    """Of an encoder as MINI."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}
    patches = {"image_size": [height, width], "patch_size": 16, "num_frames": num_frames, "tubelet_size": 2}
    return VideoMAEConfig(**patches, **sizes, layer_norm_eps=1e-6, **options)


def hugging_face_twin(student, num_frames, height, width):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    decoder = {f"decoder_{name}": size for name, size in sizes.items()}
    config = their_config(num_frames, height, width, norm_pix_loss=True, use_mean_pooling=False, **decoder)
    twin = VideoMAEForPreTraining(config).eval()
    twin.decoder.norm.eps = 1e-6  # theirs is PyTorch's default, VideoMAE's own code has 1e-6
    twin.load_state_dict(to_hugging_face(student.state_dict()), strict=True)
    return twin


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_loss_equal_hugging_face(shape):
    student, (clips, mask) = random_student(), clip_and_mask(*shape)
    with torch.no_grad():
        ours, theirs = student(clips, mask), hugging_face_twin(student, *shape[:3])(clips.transpose(1, 2), mask)
    assert ours.shape == (2, shape[3], 1536) and ours.std() > 0.1
    torch.testing.assert_close(ours, theirs.logits, atol=1e-4, rtol=0)

    target = torch.randn(2, mask.shape[1], 1536)[mask].view(2, -1, 1536)
    torch.testing.assert_close(F.mse_loss(ours, target), ((theirs.logits - target) ** 2).mean(), atol=1e-4, rtol=0)
    pixels = PixelTarget()(clips)[mask].view(2, -1, 1536)  # their loss, with their own targets
    torch.testing.assert_close(F.mse_loss(ours, pixels), theirs.loss, atol=1e-4, rtol=0)


def test_gradients_equal_hugging_face():
    student, (clips, mask) = random_student(), clip_and_mask(8, 32, 48, 15)
    twin, target = hugging_face_twin(student, 8, 32, 48), torch.randn(2, 15, 1536)
    F.mse_loss(student(clips, mask), target).backward()
    F.mse_loss(twin(clips.transpose(1, 2), mask).logits, target).backward()
    theirs = dict(twin.named_parameters())
    for name, grad in to_hugging_face({name: p.grad for name, p in student.named_parameters()}).items():
        torch.testing.assert_close(grad, theirs[name].grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("num_tokens, dim", [(1568, 768), (1568, 192), (98, 384), (5, 30)])
def test_positions_equal_hugging_face(num_tokens, dim):
    expected = get_sinusoid_encoding_table(num_tokens, dim)
    torch.testing.assert_close(sinusoid_positions(num_tokens, dim), expected, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------ released checkpoints

BLOCK = {  # shapes in widths
    "norm1.weight": (1,), "norm1.bias": (1,), "attn.q_bias": (1,), "attn.v_bias": (1,), "attn.qkv.weight": (3, 1),
    "attn.proj.weight": (1, 1), "attn.proj.bias": (1,), "norm2.weight": (1,), "norm2.bias": (1,),
    "mlp.fc1.weight": (4, 1), "mlp.fc1.bias": (4,), "mlp.fc2.weight": (1, 4), "mlp.fc2.bias": (1,),
}  # fmt: skip
# size: encoder width, depth, decoder width, target width, tensors, heads of encoder and decoder
RELEASED = {
    "small": (384, 12, 192, 384, 218, 6, 3),
    "base": (768, 12, 384, 768, 218, 12, 6),
    "large": (1024, 24, 512, 768, 374, 16, 8),
    "huge": (1280, 32, 640, 1536, 478, 16, 8),
}


def blocks(prefix, width, number):
    """Names and shapes of the tensors of so many blocks."""
    of_block = {name: tuple(width * side for side in shape) for name, shape in BLOCK.items()}
    return {f"{prefix}blocks.{i}.{name}": shape for i in range(number) for name, shape in of_block.items()}


def released_shapes(width, depth, decoder_width, out_dim):
    """Names and shapes of the tensors in the released files."""
    return {
        "mask_token": (1, 1, decoder_width),
        "encoder_to_decoder.weight": (decoder_width, width),
        "encoder.patch_embed.proj.weight": (width, 3, 2, 16, 16),
        "encoder.patch_embed.proj.bias": (width,),
        **blocks("encoder.", width, depth),
        "encoder.norm.weight": (width,),
        "encoder.norm.bias": (width,),
        **blocks("decoder.", decoder_width, 4),
        "decoder.norm.weight": (decoder_width,),
        "decoder.norm.bias": (decoder_width,),
        "decoder.head.weight": (out_dim, decoder_width),
        "decoder.head.bias": (out_dim,),
    }


@pytest.mark.parametrize("size", RELEASED)
def test_names_and_shapes_equal_the_released_ones(size):
    """And heads, which leave no trace in the shapes."""
    *widths, number, heads, decoder_heads = RELEASED[size]
    with torch.device("meta"):
        model = MODELS[f"pretrain_videomae_{size}_patch16_224"](decoder_depth=4, decoder_num_classes=widths[-1])
        plain = MODELS[f"pretrain_videomae_{size}_patch16_224"]()
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert ours == released_shapes(*widths) and len(ours) == number
    assert {block.attn.num_heads for block in model.encoder.blocks} == {heads}
    assert {block.attn.num_heads for block in model.decoder.blocks} == {decoder_heads}
    assert len(plain.decoder.blocks) == 4 and plain.decoder.head.out_features == 768


# -------------------------------------------------------------------------------------------------- masks and tokens


def test_split_tokens():
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    visible, hidden = split_tokens(mask)
    assert visible.tolist() == [[1, 3, 4], [0, 1, 2]] and hidden.tolist() == [[0, 2], [3, 4]]
    for ours, known in zip(split_tokens(mask), split_tokens(mask, num_masked=2)):
        assert torch.equal(ours, known)


def test_take_tokens_equals_gather():
    tokens, index = torch.randn(3, 7, 4), torch.randint(7, (6, 5))
    expected = tokens.repeat(2, 1, 1).gather(1, index[..., None].expand(-1, -1, 4))
    assert torch.equal(take_tokens(tokens, index), expected)


def test_rows_with_different_counts_are_refused():
    clips, mask = clip_and_mask(4, 32, 32, 5)
    mask[1, mask[1].nonzero()[0]] = False
    with pytest.raises(ValueError, match=r"\[5, 4\]"):
        random_student()(clips, mask)


def test_several_masks_a_clip_equal_several_passes():
    """Also in the gradient."""
    student, (clips, _) = random_student(), clip_and_mask(8, 48, 32, 0, batch=3)
    masks, target = random_masks(9, 24, 17), torch.randn(9, 17, 1536)
    output = student(clips, masks)
    F.mse_loss(output, target).backward()
    together = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    apart = [student(clips, part) for part in masks.split(3)]
    (sum(map(F.mse_loss, apart, target.split(3))) / 3).backward()
    torch.testing.assert_close(output, torch.cat(apart), atol=1e-5, rtol=0)
    assert (output[:3] - output[3:6]).abs().max() > 0.1
    for grad, parameter in zip(together, student.parameters()):
        torch.testing.assert_close(grad, parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_residual_stream_and_norms_keep_half_precision_under_autocast():
    """Autocast alone would run norms in fp32, and the fp32 mask token would make the decoder's stream fp32."""
    model, seen = random_student(), []
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 3, 4, 32, 32), random_masks(1, 8, 5))
    assert len(seen) == 2 * (3 + 2) + 2 and set(seen) == {(torch.bfloat16, torch.bfloat16)}


def test_norms_equal_torchs():
    norm, x = LayerNorm(24), torch.randn(3, 5, 24)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    assert torch.equal(norm(x), F.layer_norm(x, (24,), norm.weight, norm.bias, 1e-6))
    torch.testing.assert_close(norm(x.bfloat16()).float(), norm(x), rtol=0.02, atol=0.05)


def test_positions_are_constants_of_a_compiled_student():
    """Traced, each compiled step would compute sines of float64 for every clip."""
    model, called = random_student(), []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method"))
        return graph.forward

    x, mask = torch.randn(1, 3, 4, 32, 32), random_masks(1, 8, 5)
    expected = model(x, mask, 5)
    model.compile(dynamic=False, backend=backend)
    torch.testing.assert_close(model(x, mask, 5), expected)
    assert len(called) > 50 and not {"sin", "cos", "double"} & set(called)


def tubelet_pixels(mask, grid):
    """Token mask [B, N] → pixel mask [B, 1, T, H, W]."""
    pixels = mask.view(-1, 1, *grid)
    return pixels.repeat_interleave(2, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)


def test_only_visible_pixels_matter():
    student, (clips, mask) = random_student(), clip_and_mask(8, 32, 48, 15)
    hidden = tubelet_pixels(mask, (4, 2, 3))
    with torch.no_grad():
        output = student(clips, mask)
        assert torch.equal(output, student(clips, mask, num_masked=15))  # the count is known, and changes nothing
        blacked = student(clips.masked_fill(hidden, 100.0), mask)
        unmasked = student(clips + torch.randn_like(clips) * ~hidden, mask)
    assert torch.equal(output, blacked) and (output - unmasked).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------------------ training


def test_evaluation_does_not_spoil_training():
    """What is computed once and kept must be usable in both modes."""
    _positions.cache_clear()
    student, (clips, mask) = random_student(), clip_and_mask(8, 32, 48, 15)
    with torch.inference_mode():
        output = student(clips, mask)
    again = student(clips, mask)
    again.square().mean().backward()
    assert torch.equal(output, again.detach())


def test_drop_path_grows_over_the_encoder_only():
    student = random_student(drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in student.encoder.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])
    assert all(getattr(block.drop_path, "drop_prob", 0.0) == 0 for block in student.decoder.blocks)


def test_initial_weights():
    torch.manual_seed(0)
    model = MODELS["pretrain_videomae_tiny_patch16_224"](decoder_num_classes=384)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias") and "patch_embed" not in name:
            assert (parameter == 0).all()
        elif parameter.ndim == 2:  # Xavier: uniform in ±sqrt(6 / (in + out))
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.98 * bound < parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    token = model.mask_token.detach()
    assert token.abs().max() <= 0.02
    expected = 0.02 * math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(1 / math.sqrt(2)))
    assert np.std(token.numpy()) == pytest.approx(expected, rel=0.25)  # 96 values of a normal cut at one sigma
