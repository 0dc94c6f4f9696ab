"""Write ``no_image`` and ``vcd`` as folders that transformers loads by ``model.generate(custom_generate=folder)``."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stethoscope import __version__
from stethoscope.core.errors import ConfigError
from stethoscope.core.files import atomic_write
from stethoscope.mitigation import contrastive
from stethoscope.mitigation.base import Mitigation
from stethoscope.mitigation.decoding import NoImageContrast, NoiseContrast
from stethoscope.tracing import interventions

_IMPORT = "from stethoscope.tracing.interventions import noised\n"
_EMPTY = "SETTINGS: dict[str, Any] = {}\n"
_README = """---
library_name: transformers
tags:
- custom_generate
---

# {name}: {source}

A decoding method against hallucinations of vision-language models, written by LVLM-Stethoscope {version} (Apache-2.0).
It reads every answer a second time, {how}, and contrasts the scores of every next token: two forward
passes for every token. Settings: {settings}. For models whose own `generate` gets `input_ids` and `pixel_values`
(LLaVA, Qwen-VL and most others, not BLIP-2); greedy decoding and sampling, single prompts or batches padded on the
left, no beams.

```python
output = model.generate(**inputs, max_new_tokens=128, custom_generate="{folder}", trust_remote_code=True)
```

Whether it helps is to be measured against greedy decoding, its plausibility cut alone and shorter answers.
"""
_HOW = {"no_image": "behind the same prompt without its image", "vcd": "behind the same prompt with a noised image"}


def write_generate_folder(method: Mitigation, folder: Path) -> list[Path]:
    """Write a method as a folder with ``custom_generate/generate.py``, which needs torch and transformers alone.

    Args:
        method: ``NoImageContrast`` or ``NoiseContrast``, with its settings.
        folder: to write into; created if it is missing.

    Returns:
        The files.

    Raises:
        ConfigError: the method has no second pass. Others are plain logits processors, or edit finished answers.
    """
    if not isinstance(method, (NoImageContrast, NoiseContrast)):
        raise ConfigError(
            f"mitigation={method.name} cannot be written as a folder of custom_generate; {' and '.join(_HOW)} can"
        )
    settings: dict[str, Any] = {"name": method.name, **asdict(method)}
    source = inspect.getsource(contrastive)
    assert _IMPORT in source
    assert _EMPTY in source
    noise = (
        f"STEPS, STEP = {interventions.STEPS}, {interventions.STEP}\n\n\n{inspect.getsource(interventions.noised)}\n"
    )
    source = source.replace(_IMPORT, noise).replace(_EMPTY, f"SETTINGS: dict[str, Any] = {settings!r}\n")
    shown = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "name")
    text = _README.format(
        name=method.name,
        source=method.source,
        version=__version__,
        how=_HOW[method.name],
        settings=shown,
        folder=folder.name,
    )
    files = {folder / "custom_generate" / "generate.py": source, folder / "README.md": text}
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    return list(files)
