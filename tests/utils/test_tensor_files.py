"""Files of tensors: what is in them and who may read them."""

import os

import torch
from safetensors import safe_open

from utils.tensor_files import write_tensors


def test_a_file_gets_the_permissions_of_any_new_file(tmp_path):
    path, other = tmp_path / "x.safetensors", tmp_path / "other"
    before = os.umask(0o027)
    try:
        write_tensors(path, {"a": torch.arange(3)}, {"made": "here"})
        other.touch()
    finally:
        os.umask(before)
    assert path.stat().st_mode == other.stat().st_mode
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a").tolist() == [0, 1, 2]
        assert file.metadata() == {"made": "here"}
