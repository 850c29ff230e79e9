"""Which machine this is, in words and as a folder name."""

import platform
import re
from pathlib import Path

import torch

# AMD hides its generation behind "EPYC" in virtual machines; family and model tell it.
# (family, first model, last model): name. Source: AMD's processor programming references.
GENERATIONS = {
    (0x17, 0x00, 0x2F): "Zen",
    (0x17, 0x30, 0xFF): "Zen 2",
    (0x19, 0x00, 0x0F): "Zen 3",
    (0x19, 0x10, 0x1F): "Zen 4",
    (0x19, 0x20, 0x5F): "Zen 3",
    (0x19, 0x60, 0xAF): "Zen 4",
    (0x1A, 0x00, 0xFF): "Zen 5",
}


def cpu_facts() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo ({} where there is none)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_name() -> str:
    """The processor's name, with the generation where the name lacks it."""
    facts = cpu_facts()
    name = facts.get("model name") or platform.processor() or platform.machine()
    if facts.get("vendor_id") == "AuthenticAMD":
        family, model = int(facts["cpu family"]), int(facts["model"])
        for (of_family, first, last), generation in GENERATIONS.items():
            if family == of_family and first <= model <= last:
                return f"{name} ({generation})"
    return name


def slug(threads: int | None = None) -> str:
    """A folder name for results: processor and threads, for example "amd-epyc-zen-4-2c"."""
    words = re.sub(r"\(r\)|\(tm\)|\bcpu\b|processor|@.*", " ", cpu_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") + f"-{threads or torch.get_num_threads()}c"
