"""The documents: links, anchors, files, flags and names that they mention exist; each sentence stands in one place."""

import argparse
import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from command_line import train_parser
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "benchmarks/**/*.md", "checkpoint/README.md")
    for path in ROOT.glob(pattern)
)
CODE_FOLDERS = ("models", "utils", "scripts", "benchmarks", "tests")
# Flags of torchrun, Slurm, TensorBoard and argparse itself.
FOREIGN_FLAGS = {"--max-restarts", "--nproc_per_node", "--batch", "--signal", "--logdir", "--help", "--help_all"}
TRAINING = {"train.py": None, "train_resnet.py": "ResNet50x3_Params", "train_flops.py": "ResNet50x3_Flops"}
FORWARDING = {"scripts/norm_study.py"}  # passes flags that it does not define to train.py
SEPARATING = {"scripts/sweep.py", "scripts/fine_tuning_table.py"}  # pass the flags after -- to train.py
# Phrases that plain technical English has a better word for; the second of each pair is what to write.
REPLACED_EVERYWHERE = {  # also in code, its comments and names
    r"leaves? (\S+ )+away": "omit",
    r"is told": "is reported",
    r"in turns": "interleaved",
    r"mend(s|ed)?": "fix",
    r"anew": "again",
    r"broken off": "interrupted",
    r"sittings?": "session",
    r"for want of": "for lack of",
    r"kept up": "maintained",
    r"knows no": "does not support",
}
REPLACED = {  # in documents; in code some of these are ordinary words
    **REPLACED_EVERYWHERE,
    r"are told": "are reported",
    r"tells": "shows",
    r"beside": "alongside, compared with",
    r"(goes|go|going) on": "continues, resumes",
    r"less `--": "without",
    r"a (folder|row|run|line) an? (class|evaluation|model|norm)": "per",
    r"for ever": "forever",
    r"no (square number|JSON)": "not a square number, not valid JSON",
    r"moods": "noise",
    r"whatever the": "independent of the",
    r"the like": "similar",
    r"so that one sees": "which shows",
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def test_documents_are_found():
    assert {"README.md", "CONTRIBUTING.md", "benchmarks/NOTES.md", "checkpoint/README.md"} <= set(
        map(name_of, DOCUMENTS)
    )
    assert any(path.parent.name == "docs" for path in DOCUMENTS)


@functools.cache
def lines_of(path):
    """(number, line, what it is: "prose", "code" or "comment") of each line of a document."""
    lines, fence, comment = [], False, False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            fence = not fence
            lines.append((number, line, "fence"))
            continue
        comment = comment or (not fence and line.startswith("<!--"))
        lines.append((number, line, "code" if fence else "comment" if comment else "prose"))
        comment = comment and "-->" not in line
    assert not fence, f"{name_of(path)}: a code block is not closed"
    return lines


def prose_of(path):
    return [(number, line) for number, line, kind in lines_of(path) if kind == "prose"]


def test_nothing_is_left_to_do():
    todo = [
        f"{name_of(path)}:{number}: {line}"
        for path in DOCUMENTS
        for number, line, _ in lines_of(path)
        if "TODO" in line or "-FIGURE" in line
    ]
    assert not todo, "\n".join(todo)


def slug(heading):
    """The anchor that GitHub gives a heading, without its markup."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@functools.cache
def anchors_of(path):
    anchors, seen = set(), {}
    for _, line in prose_of(path):
        if heading := re.match(r"#{1,6} (.*)", line):
            anchor = slug(heading[1])
            repeated = seen.get(anchor, 0)
            seen[anchor] = repeated + 1
            anchors.add(f"{anchor}-{repeated}" if repeated else anchor)
    return anchors


def links_of(path):
    """(line number, target) of each relative link and image outside of code."""
    for number, line in prose_of(path):
        without_code = re.sub(r"`[^`]*`", "", line)
        for match in re.finditer(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", without_code):
            target = match[1] or match[2]
            if not re.match(r"[a-z]+:", target):
                yield number, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_and_images_resolve(path):
    problems = []
    for number, target in links_of(path):
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        if not found.is_relative_to(ROOT) or not found.exists():
            problems.append(f"{name_of(path)}:{number}: {target} does not exist")
        elif anchor and anchor not in anchors_of(found):
            problems.append(f"{name_of(path)}:{number}: {target}: the file has no heading with the anchor #{anchor}")
    assert not problems, "\n".join(problems)


def test_anchors_follow_githubs_rule():
    assert slug("Why the CNNs are not 1.3 times as fast") == "why-the-cnns-are-not-13-times-as-fast"
    assert slug("A step of `ViT-B_16`: [link](x.md), *two*") == "a-step-of-vit-b_16-link-two"


def test_readme_links_to_each_page():
    linked = {(ROOT / target.partition("#")[0]).resolve() for _, target in links_of(ROOT / "README.md")}
    pages = [path for path in DOCUMENTS if path.parent.name == "docs"]
    missing = [name_of(page) for page in pages if page not in linked]
    assert not missing, f"README.md has no link to {', '.join(missing)}"


def test_readme_has_at_most_200_lines():
    count = len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    assert count <= 200, f"README.md has {count} lines; move details to docs/"


@functools.cache
def code_files():
    """Paths of the repository's scripts and modules, relative to its root, as strings."""
    files = [path for suffix in ("py", "sh", "ipynb") for path in ROOT.glob(f"*.{suffix}")]
    files += [
        path for folder in CODE_FOLDERS for suffix in ("py", "sh") for path in (ROOT / folder).rglob(f"*.{suffix}")
    ]
    return {name_of(path) for path in files}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_that_a_document_names_exist(path):
    """A path is one from the root; a bare name may be that of any of the project's files."""
    bare = {file.rpartition("/")[2] for file in code_files()}
    problems = []
    for number, line, kind in lines_of(path):
        if kind in ("comment", "fence"):
            continue
        for match in re.finditer(r"(?<![\w./-])[\w/]+\.(?:py|sh|ipynb)\b", line):
            if match[0] not in (code_files() if "/" in match[0] else bare):
                problems.append(f"{name_of(path)}:{number}: there is no file {match[0]}")
    assert not problems, "\n".join(problems)


@functools.cache
def defined_flags():
    """Each flag that a script or module of the project writes as a string."""
    text = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in code_files() if "tests/" not in file)
    return set(re.findall(r"[\"'](--[a-z]\w*(?:-\w+)*)[\"']|(?<=\s)(--[a-z]+)\)", text))


def is_defined(flag):
    return flag in FOREIGN_FLAGS or any(flag in pair for pair in defined_flags())


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_flags_in_the_text_exist(path):
    problems = []
    for number, line in prose_of(path):
        for code in re.findall(r"`([^`]*)`", line):
            for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code):
                if not is_defined(flag):
                    problems.append(f"{name_of(path)}:{number}: no script has the flag {flag}")
    assert not problems, "\n".join(problems)


def commands_of(path):
    """(line number, script, its arguments) of each command in a shell block that starts a Python script."""
    command, start, language = "", None, None
    for number, line, kind in lines_of(path):
        if kind == "fence":
            language = line.removeprefix("```").strip()
        elif kind == "code" and language == "shell":
            start = start or number
            command += line.removesuffix("\\") + " "
            if line.endswith("\\"):
                continue
            if re.search(r"\b(python|torchrun)\b.*\.py\b", command):
                words = shlex.split(command, comments=True)
                scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
                if scripts and "pytest" not in words:  # without scripts, it is a comment only
                    yield start, words[scripts[0]], words[scripts[0] + 1 :]
            command, start = "", None


def all_commands():
    return [
        pytest.param(number, script, arguments, path, id=f"{name_of(path)}:{number}")
        for path in DOCUMENTS
        for number, script, arguments in commands_of(path)
    ]


class ParsedError(Exception):
    """Ends a script's `parse_flags()` when its flags are parsed, before it looks for files."""


def parse(script, arguments, monkeypatch):
    """The arguments that the script's parser does not know; raises UserError or SystemExit for wrong values."""
    if script in TRAINING:
        return train_parser("", TRAINING[script]).parse_known_args(arguments)[1]
    if arguments[:1] == ["--full"]:
        return parse("scripts/fine_tuning_table.py", arguments[1:], monkeypatch)
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser, *given):
        raise ParsedError(parse_known_args(parser, *given)[1])

    folder, _, file = script.rpartition("/")
    monkeypatch.syspath_prepend(ROOT / folder)
    module = importlib.import_module(file.removesuffix(".py"))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(ParsedError) as parsed:
        module.parse_flags()
    monkeypatch.undo()
    unknown = parsed.value.args[0]
    if script in SEPARATING and "--" in arguments:
        unknown += parse("train.py", ["--name", "run", *arguments[arguments.index("--") + 1 :]], monkeypatch)
    return parse("train.py", ["--name", "run", *unknown], monkeypatch) if script in FORWARDING else unknown


def test_commands_are_found():
    scripts = {parameter.values[1] for parameter in all_commands()}
    assert {*TRAINING, "evaluate.py", "visualize.py", "scripts/norm_study.py", "benchmarks/throughput.py"} <= scripts


@pytest.mark.parametrize("number, script, arguments, path", all_commands())
def test_commands_parse(number, script, arguments, path, monkeypatch):
    where = f"{name_of(path)}:{number}: {script}"
    assert (ROOT / script).exists(), f"{where} does not exist"
    try:
        unknown = parse(script, arguments, monkeypatch)
    except (UserError, SystemExit) as error:
        pytest.fail(f"{where}: {error}")
    assert not unknown, f"{where} does not accept {' '.join(unknown)}"


def test_contributing_names_tables_that_exist():
    """A row that names a table such as `TOKEN_NORMS` and files: one of the files defines it."""
    problems, rows = [], 0
    for number, line in prose_of(ROOT / "CONTRIBUTING.md"):
        names = re.findall(r"`([A-Z][A-Z_]+)`", line)
        files = [file for file in re.findall(r"`([\w/]+\.py)`", line) if (ROOT / file).exists()]
        if line.startswith("|") and names:
            rows += 1
            text = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
            problems += [
                f"CONTRIBUTING.md:{number}: no file of the row defines {name}"
                for name in names
                if not re.search(rf"^{name}\b.*=", text, re.MULTILINE)
            ]
    assert rows >= 6
    assert not problems, "\n".join(problems)


def test_each_change_in_contributing_names_a_test():
    rows = [
        (number, line)
        for number, line in prose_of(ROOT / "CONTRIBUTING.md")
        if line.startswith("| ") and not line.startswith("| change")
    ]
    assert len(rows) >= 15
    without = [f"CONTRIBUTING.md:{number}" for number, line in rows if not re.search(r"`tests/test_\w+\.py` \|$", line)]
    assert not without, f"rows without a test in the last column: {', '.join(without)}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_language_is_plain(path):
    problems = []
    for number, line in prose_of(path):
        for phrase, instead in REPLACED.items():
            if found := re.search(rf"(?<!\w){phrase}(?!\w)", line, re.IGNORECASE):
                problems.append(f'{name_of(path)}:{number}: "{found[0]}"; write: {instead}')
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("file", sorted(code_files() - {name_of(Path(__file__))}))
def test_language_of_code_is_plain(file):
    """Names count too: a part of one is a word of its own."""
    problems = []
    for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), start=1):
        for phrase, instead in REPLACED_EVERYWHERE.items():
            if found := re.search(rf"(?<![a-z]){phrase}(?![a-z])", line, re.IGNORECASE):
                problems.append(f'{file}:{number}: "{found[0]}"; write: {instead}')
    assert not problems, "\n".join(problems)


def sentences_of(path):
    """(line number, sentence) of the text outside of code, tables, headings and the links between pages."""
    paragraph, start = [], None
    for number, line in [*prose_of(path), (None, "")]:
        if " · [" in line:
            continue
        ends = not line.strip() or line.startswith(("|", "#", "![")) or re.match(r"\s*(- |\d+\. )", line)
        if ends and paragraph:
            text = " ".join(paragraph).replace("*", "")
            yield from ((start, sentence.strip()) for sentence in re.split(r"(?<=[.!?])\s+", text))
            paragraph, start = [], None
        if line.strip() and not line.startswith(("|", "#", "![")):
            start = start or number
            paragraph.append(line.strip().removeprefix("- "))


def test_no_sentence_stands_in_two_documents():
    places, problems = {}, []
    for path in DOCUMENTS:
        for number, sentence in sentences_of(path):
            key = re.sub(r"\W+", " ", re.sub(r"\]\([^)]*\)", "", sentence)).lower()
            if len(sentence) < 60:
                continue
            other = places.setdefault(key, (path, number, sentence))
            if other[0] != path:
                problems.append(f'{name_of(path)}:{number} repeats {name_of(other[0])}:{other[1]}: "{sentence}"')
    assert len(places) > 100
    assert not problems, "\n".join(problems)


REFERENCES = (
    "Dosovitskiy",
    "Steiner",
    "Kolesnikov",
    "Bolya",
    "Shao",
    "Abnar",
    "Jordan",
    "Nemhauser",
    "Selvaraju",
    "Chefer",
)


def test_citation_file_has_the_required_keys():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    top = dict(re.findall(r"^([a-z-]+):[ \t]*(.*)$", text, re.MULTILINE))
    missing = {"cff-version", "message", "title", "authors", "references", "license"} - top.keys()
    assert not missing, f"CITATION.cff has no {', '.join(sorted(missing))}"
    assert top["cff-version"] == "1.2.0"
    assert "\t" not in text


def test_citation_file_names_the_papers():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert all(isinstance(citation[key], str) for key in ("cff-version", "message", "title"))
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    for reference in citation["references"]:
        wanted = {"type", "title", "authors", "year"}
        assert wanted <= reference.keys(), f"CITATION.cff: {reference.get('title')} needs {', '.join(sorted(wanted))}"
        assert all("family-names" in author for author in reference["authors"]), reference["title"]
    first_authors = [reference["authors"][0]["family-names"] for reference in citation["references"]]
    missing = [name for name in REFERENCES if name not in first_authors]
    assert not missing, f"CITATION.cff does not cite the papers of {', '.join(missing)}"
