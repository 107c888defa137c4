import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from serving.nano.build import build_checkpoint, build_random_weights, read_trained_weights, weight_shapes
from serving.nano.config import NANO, NanoConfig


def read_all(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    first = build_checkpoint(tmp_path / "a", random=True)
    second = build_checkpoint(tmp_path / "b", random=True)
    assert read_all(first) == read_all(second)


def test_an_up_to_date_directory_is_left_alone(tmp_path: Path) -> None:
    build_checkpoint(tmp_path, random=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    build_checkpoint(tmp_path, random=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["missing", "short", "no stamp", "broken stamp"])
def test_a_damaged_directory_is_mended(tmp_path: Path, damage: str) -> None:
    whole = read_all(build_checkpoint(tmp_path, random=True))
    match damage:
        case "missing":
            (tmp_path / "tokenizer.json").unlink()
        case "short":
            (tmp_path / "model.safetensors").write_bytes(b"")
        case "no stamp":
            (tmp_path / ".stamp.json").unlink()
        case _:
            (tmp_path / ".stamp.json").write_text("[")
    assert read_all(build_checkpoint(tmp_path, random=True)) == whole


def test_random_weights_have_every_shape_in_float32() -> None:
    weights = build_random_weights()
    assert {name: weight.shape for name, weight in weights.items()} == weight_shapes()
    assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}
    assert 5e6 < sum(weight.size for weight in weights.values()) < 8e6


def test_the_checkpoint_holds_the_shipped_weights(tmp_path: Path) -> None:
    trained = read_trained_weights()
    weights = load_file(build_checkpoint(tmp_path) / "model.safetensors")
    is_random = np.array_equal(weights["lm_head.weight"], build_random_weights()["lm_head.weight"])
    assert is_random == (trained is None)


def test_config_agrees_with_the_sizes(tmp_path: Path) -> None:
    directory = build_checkpoint(tmp_path, random=True)
    config = json.loads((directory / "config.json").read_bytes())
    assert config["architectures"] == ["DeepseekOCRForCausalLM"]
    assert config["language_config"]["hidden_size"] // config["language_config"]["num_attention_heads"] == 64
    assert config["projector_config"]["input_dim"] == NANO.clip_width + NANO.downsample_channels[1]
    assert config["vision_config"]["width"]["clip-l-14-224"]["image_size"] == 112
    processor = json.loads((directory / "preprocessor_config.json").read_bytes())
    assert (processor["base_size"], processor["image_size"], processor["crop_mode"]) == (512, 512, False)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="widths must agree"):
        NanoConfig(clip_width=128)
    with pytest.raises(ValueError, match="equally wide"):
        NanoConfig(num_heads=3)


def test_the_command_imports_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from serving.nano.build import build_checkpoint;"
        "build_checkpoint(Path(sys.argv[1])); print({'torch', 'vllm', 'ray', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
