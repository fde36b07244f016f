"""The Hydra configuration: a YAML file per verb, a directory per group, a comment per key."""

import re
from importlib import resources


def help_text(name: str) -> str:
    """Return every key of `NAME.yaml` and its groups with its default and comment."""
    root = resources.files("asrllm.conf")
    main = (root / f"{name}.yaml").read_text()
    parts = [main.partition("\n\n")[2]]
    for group, choice in re.findall(r"^  - (?:/)?(\w+): (\w+)$", main, flags=re.M):
        lines = (root / group / f"{choice}.yaml").read_text().splitlines()
        indented = [f"  {line}\n" if line else "\n" for line in lines]
        parts.append(f"{group}:\n" + "".join(indented))
    return "\n".join(parts)
