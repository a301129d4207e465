"""Clips and a small CLIP for tests of teachers, and the statistics of pixels as the papers print them."""

import json

import open_clip
import torch
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def random_clips(num_frames, side=224, batch=1, seed=0):
    """ImageNet-normalised [B, 3, T, H, W], smooth enough to look like pictures."""
    small = torch.rand(batch, 3, num_frames, 8, 8, generator=torch.Generator().manual_seed(seed))
    clips = F.interpolate(small.flatten(0, 1), size=(side, side), mode="bilinear").unflatten(0, (batch, 3))
    return (clips - torch.tensor(IMAGENET_MEAN).view(3, 1, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1, 1)


SMALL_CLIP = "small-clip"


def make_small_clip(folder):
    """A CLIP of two layers for 128 pixels, with weights as fp16 stores them; open_clip knows it from now on."""
    vision = {"image_size": 128, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    (folder / f"{SMALL_CLIP}.json").write_text(json.dumps({"embed_dim": 48, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / f"{SMALL_CLIP}.json")
    torch.manual_seed(5)
    return open_clip.create_model(SMALL_CLIP).eval().half().float()
