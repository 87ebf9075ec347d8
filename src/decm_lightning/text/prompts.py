"""Read files of prompts."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """A prompt and its line in the file as JSON, with all keys that a scorer reads."""

    text: str
    line: str


def read_prompts(file: Path) -> list[Prompt]:
    """Return the prompts of a text file with one prompt per line, or of a .jsonl file.

    The latter has one JSON object per line with the prompt under "prompt", such as GenEval's evaluation_metadata.jsonl.

    Raises:
        OSError: if the file does not exist or cannot be read.
        ValueError: naming the file and line, if a line is empty or has another form.
    """
    try:
        content = file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file of prompts at {file}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    if not content:
        raise ValueError(f"{file} is empty: expected one prompt per line")
    parse = _parse_json if file.suffix == ".jsonl" else _parse_text
    # str.splitlines would also split at characters that a JSON string may contain.
    return [parse(line, f"{file}, line {number}") for number, line in enumerate(content.split("\n"), start=1)]


def _parse_text(line: str, where: str) -> Prompt:
    if not line.strip():
        raise ValueError(f"{where}: the prompt is empty")
    return Prompt(line.strip(), json.dumps({"prompt": line.strip()}, ensure_ascii=False))


def _parse_json(line: str, where: str) -> Prompt:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: invalid JSON ({error.msg} at character {error.pos + 1})") from error
    text = content.get("prompt") if isinstance(content, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where}: expected an object with {{"prompt": "..."}}: got {line[:60]}')
    if not text.strip():
        raise ValueError(f"{where}: the prompt is empty")
    return Prompt(text, line)
