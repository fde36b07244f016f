"""The documentation agrees with the repository: links, names of keys and files, and messages."""

import ast
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from asrllm.collator.hotwords import HotwordConfig
from asrllm.config_keys import our_key, unknown_key
from asrllm.data.prompts import Prompt, parse_prompts
from asrllm.data.sources import SOURCES
from asrllm.data.sources.detect import detect_source
from asrllm.models.encoders.registry import ENCODERS
from asrllm.models.model_args import LoraPart, PeftOptions
from asrllm.models.projectors import PROJECTORS
from asrllm.schema import keys_and_types
from asrllm.training.checkpoint.zero_files import plain_classes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "RESULTS.md",
    ROOT / "SECURITY.md",
]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
CELL_BORDER = re.compile(r"(?<!\\)\|")
KEY = re.compile(r"[a-z_]+(\.[a-z_]+)*")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
GROUPS = ("checkpoint.", "data.", "model.", "trainer.")
NOT_KEYS = {"data.py", "trainer.fit"}
SOURCE_FILE = re.compile(r"(asrllm|benchmarks|ds_configs|examples|launch|tests)/[\w./]+\.\w+")
# The border of two string literals that Python joins, on two lines of a source file.
JOINED_LITERALS = re.compile(r"""["']\s*\n\s*f?["']""")


def prose_of(page: Path) -> str:
    """Return a page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, by the rule of GitHub."""
    anchors = set()
    for heading in HEADING.findall(prose_of(page)):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(plain.strip().replace(" ", "-"))
    return anchors


def tables_of(page: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield the header and the rows of each table of a page."""
    for block in re.findall(r"(?:^\|.*\n)+", prose_of(page), re.MULTILINE):
        rows = []
        for line in block.splitlines():
            cells = CELL_BORDER.split(line.strip())[1:-1]
            rows.append([cell.strip() for cell in cells])
        header, _, *body = rows
        yield header, body


def known_keys() -> dict[str, set[str]]:
    """Return the configuration keys of each verb, from the generated page."""
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    verbs = {}
    for section in text.split("\n## asrllm ")[1:]:
        verb = section.partition("\n")[0]
        verbs[verb] = set(re.findall(r"^\| `([^`]+)`", section, re.MULTILINE))
    return verbs


def options_of_commands() -> dict[str, set[str]]:
    """Return the options of each verb, and of each action of `shards`, from the generated page."""
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    commands = {}
    for section in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0].removeprefix("asrllm ")
        commands[title] = {"--help", *OPTION.findall(section)}
    return commands


def commands_of(page: Path) -> Iterator[str]:
    """Yield the `asrllm` commands of a page, in blocks of code and in text."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(FENCE.findall(text)).replace("\\\n", " ")
    for line in (*blocks.splitlines(), *CODE.findall(prose_of(page))):
        command = re.match(r"(?:\S*/)?asrllm (.*)", line.partition("#")[0].strip())
        if command:
            yield command[1]


def test_commands_have_the_options_that_pages_use():
    options = options_of_commands()
    with_hydra = {"train", "plan", "warm-start", "doctor", "evaluate"}
    unknown = []
    found = 0
    for page in PAGES:
        for command in commands_of(page):
            words = command.split()
            verb = words[0]
            if verb == "VERB" or not re.fullmatch(r"[a-z][a-z-]+", verb):
                continue
            name = " ".join(words[:2]) if verb == "shards" and len(words) > 1 else verb
            if name not in options:
                unknown.append(f"{page.relative_to(ROOT)}: asrllm {name}")
                continue
            known = options[name] | (options["Hydra's options"] if verb in with_hydra else set())
            for option in OPTION.findall(command):
                found += 1
                if option not in known:
                    unknown.append(f"{page.relative_to(ROOT)}: asrllm {name} {option}")
    assert found > 40
    assert not unknown


def test_pages_name_existing_keys():
    keys = set().union(*known_keys().values())
    groups = {key.rpartition(".")[0] for key in keys}
    unknown = []
    for page in PAGES:
        if page.name == "migration.md":  # keys of other frameworks, see below
            continue
        for code in CODE.findall(prose_of(page)):
            name = code.partition("=")[0].removesuffix(".*")
            if not name.startswith(GROUPS) or not KEY.fullmatch(name) or name in NOT_KEYS:
                continue
            is_known = name in keys or any(f"{group}.".startswith(f"{name}.") for group in groups)
            if not is_known:
                unknown.append(f"{page.relative_to(ROOT)}: {code}")
    assert not unknown


def test_reasons_of_rejection_are_listed():
    listed: set[str] = set()
    for header, rows in tables_of(DOCS / "data.md"):
        if header[0] == "Reason":
            for row in rows:
                listed |= set(CODE.findall(row[0]))
    raised = set()
    texts = set()
    for path in ROOT.glob("asrllm/data/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            value = None
            if isinstance(node, ast.Constant):
                texts.add(node.value)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "RejectedError":
                value = node.args[0]
            elif isinstance(node, ast.keyword) and node.arg == "reason":
                value = node.value
            if isinstance(value, ast.Constant):
                raised.add(value.value)
    assert len(raised) > 20
    assert raised - listed == set()
    assert listed - texts == set()


@pytest.mark.parametrize(
    ("heading", "source"),
    [
        pytest.param("Lhotse cuts", "cuts", marks=pytest.mark.slow),  # imports Lhotse
        ("NeMo", "nemo"),
        ("wenet", "wenet"),
        ("SLAM-LLM", "slam"),
        ("ms-swift and LLaMA-Factory", "swift"),
        ("Folders and tables", "folder"),
    ],
)
def test_rows_of_the_data_page_are_read(heading, source, tmp_path):
    section = (DOCS / "data.md").read_text(encoding="utf-8").partition(f"### {heading}\n")[2]
    block = re.search(r"^```(json|csv)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    soundfile.write(tmp_path / "a.wav", np.zeros(32000), 16000)
    path = tmp_path / "metadata.csv"
    if block[1] == "json":
        path = tmp_path / "manifest.jsonl"
        path.write_text(json.dumps(json.loads(block[2])) + "\n", encoding="utf-8")
    else:
        path.write_text(block[2], encoding="utf-8")
    place = path.parent if source == "folder" else path
    if source != "folder":
        assert detect_source(path) == source
    (utterance,) = SOURCES[source].read(place)
    assert (utterance.problem, utterance.text) == (None, "Good morning.")
    wave, rate = utterance.load()
    assert rate == 16000
    assert len(wave) in (24000, 32000)


def test_prompts_of_the_page_fit_as_it_says():
    page = DOCS / "prompts.md"
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    prompts = parse_prompts(yaml.safe_load(block), "the page")
    tables = {header[0]: rows for header, rows in tables_of(page)}
    assert {row[0].strip("`") for row in tables["Key"]} == keys_and_types(Prompt).keys()
    rows = tables["Utterance"]
    for utterance, fitting in rows:
        fields = dict(word.split("=") for word in utterance.strip("`").split())
        found = [p.text for p in prompts if p.fits(fields["lang"], fields.get("task"))]
        assert found == CODE.findall(fitting), utterance
    assert len(rows) == 3


def test_pages_list_all_choices():
    def first_column(page: str, header: str) -> list[str]:
        (rows,) = [rows for head, rows in tables_of(DOCS / page) if head[0] == header]
        return [code for row in rows for code in CODE.findall(row[0])]

    assert set(first_column("models.md", "`model_type`")) == ENCODERS.keys()
    assert set(first_column("models.md", "`model.projector`")) == PROJECTORS.keys()
    assert set(first_column("data.md", "Source")) == {f"--{name}" for name in SOURCES}
    hotwords = {f"data.hotwords.{key}" for key in keys_and_types(HotwordConfig)}
    assert set(first_column("prompts.md", "Setting")) == hotwords
    models = set(CODE.findall(prose_of(DOCS / "models.md")))
    lora = {key for key in keys_and_types(LoraPart) if key != "options"}
    assert {*keys_and_types(PeftOptions), *lora} <= models
    assert f"{numeral(len(plain_classes()))} of its plain classes" in prose_of(ROOT / "SECURITY.md")


def numeral(number: int) -> str:
    """Return a small number as a word."""
    return ("no", "one", "two", "three", "four", "five", "six")[number]


def test_encoders_have_the_rates_and_limits_of_the_page():
    (rows,) = [rows for head, rows in tables_of(DOCS / "models.md") if head[0] == "`model_type`"]
    fields = {"max_source_positions": 1500}
    for kind, _, _, rate, limits in rows:
        if rate == "by family":
            continue
        encoder = ENCODERS[kind.strip("`")]
        assert round(encoder.frame_lengths(1600000, fields) / 100) == int(rate)
        low, high = encoder.sample_limits(fields)
        texts = [f"{low / 16:g} ms", f"{high / 16000:.0f} s"]
        if high > 1600000:
            texts[1] = f"{high / 16000 / 3600:g} h"
        assert limits == " to ".join(texts)


def test_links_point_to_files_and_headings():
    broken = []
    for page in PAGES:
        for link in LINK.findall(CODE.sub("", prose_of(page))):
            if "://" in link:
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if target.is_dir():
                target = target / "README.md"
            is_heading = not anchor or anchor in anchors_of(target)
            if not target.is_file() or not is_heading:
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def test_every_page_is_in_the_navigation_and_linked_from_the_readme():
    pages = {page.name for page in DOCS.glob("*.md")}
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert pages <= set(leaves(navigation))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert pages <= {posixpath.basename(link) for link in LINK.findall(readme)}


def leaves(tree: object) -> Iterator[str]:
    """Yield the texts at the ends of nested lists and mappings."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from leaves(branch)
    elif isinstance(tree, list):
        for branch in tree:
            yield from leaves(branch)


def test_named_source_files_exist():
    missing = []
    for page in PAGES:
        for code in CODE.findall(prose_of(page)):
            if SOURCE_FILE.fullmatch(code) and not (ROOT / code).is_file():
                missing.append(f"{page.relative_to(ROOT)}: {code}")
    assert not missing


def migration_rows(header: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the code of the first two cells of each row of the tables with a header."""
    for head, rows in tables_of(DOCS / "migration.md"):
        if head[0] == header:
            for theirs, ours, *_ in rows:
                yield CODE.findall(theirs), CODE.findall(ours)


def test_migration_names_existing_keys():
    keys = known_keys()
    unknown = []
    for header, verb in (("Their key", "train"), ("Their key in evaluation", "evaluate")):
        for theirs, ours in migration_rows(header):
            assert theirs, ours
            names = [code.partition("=")[0] for code in ours]
            unknown += [(theirs, name) for name in names if name not in keys[verb]]
    for _, rows in tables_of(DOCS / "migration.md"):
        for row in rows:
            for code in CODE.findall(row[-1]):
                name, is_setting, _ = code.partition("=")
                is_ours = is_setting and "." in name and KEY.fullmatch(name)
                if is_ours and name not in keys["train"] | keys["evaluate"]:
                    unknown.append((row[0], name))
    assert not unknown


def test_migration_agrees_with_the_keys_that_errors_translate():
    keys = known_keys()["train"]
    different = []
    for theirs, ours in migration_rows("Their key"):
        name = re.split(r"[ .]", theirs[0].removeprefix("--"))[-1]
        if " " in theirs[0]:
            continue  # several keys, or one value of a key
        answer = our_key(name.replace("-", "_"), keys)
        if answer and answer not in ours:
            different.append((theirs, ours, answer))
    assert not different


def test_errors_name_our_key_for_every_key_of_the_migration_tables():
    keys = known_keys()["train"]
    unanswered = []
    for theirs, ours in migration_rows("Their key"):
        name = theirs[0].removeprefix("--").replace("-", "_")
        is_group = any(key.startswith(f"{name}.") for key in keys)
        # several keys, our own, or a name that has another meaning elsewhere
        if " " in name or name in keys or is_group or name.endswith(".type"):
            continue
        message = str(unknown_key(name, keys))
        if not any(key.partition("=")[0] in message for key in ours):
            unanswered.append((name, message))
    assert not unanswered


def test_quoted_messages_occur_in_the_source():
    source = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("asrllm/**/*.py"))
    source = JOINED_LITERALS.sub("", source)
    quoted = []
    for header, rows in tables_of(DOCS / "troubleshooting.md"):
        if header[0] == "Message or symptom":
            for row in rows:
                quoted += [code for code in CODE.findall(row[0]) if " " in code]
    assert len(quoted) > 25
    missing = []
    for message in quoted:
        words = message.replace("\\|", "|").strip(". ").split("...")
        pattern = r"[^\n]{0,90}?".join(re.escape(part.strip()) for part in words)
        if not re.search(pattern, source):
            missing.append(message)
    assert not missing
