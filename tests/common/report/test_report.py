"""The page of a run: what it shows, that it is one safe file, and what a folder may lack."""

import json
import re
import shutil
import time
from html.parser import HTMLParser

import pytest

from common.cli import run_program
from common.errors import InputError
from common.report import __main__ as program
from common.report import page, runs
from common.report.page import Html, tag
from tests.common.report import made
from tests.common.report.made import page_of


class Parser(HTMLParser):
    """The tags of a page, its headings, its links to other files, and whether every tag is closed."""

    VOID = {*page.VOID}

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.headings, self.sources, self.texts = [], set(), [], [], []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.names.add(name)
        self.sources += [value for key, value in attributes if key in ("src", "data", "srcset", "xlink:href")]
        assert not any(key.startswith("on") for key, _ in attributes)
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        self.texts.append(text)
        if self.open and self.open[-1] == "h2":
            self.headings.append(text)


def text_of(folder):
    return " ".join(Parser(page_of(folder)).texts)


# ---------------------------------------------------------------- content


@pytest.mark.parametrize(
    "kind, headings",
    [
        (
            "pretraining",
            ["Reconstructions", "Curves", "Health", "Speed", "Settings", "Environment", "How to cite"],
        ),
        ("finetuning", ["Scores", "Curves", "Speed", "Settings", "Environment", "How to cite"]),
        ("sweep", ["Results", "Settings", "Environment", "How to cite"]),
        ("classification", ["Scores", "Curves", "Speed", "Settings", "Environment", "How to cite"]),
        ("score_card", ["Scores", "How to cite"]),
    ],
)
def test_a_run_has_its_sections_and_nothing_from_elsewhere(tmp_path, kind, headings):
    folder = getattr(made, kind)(tmp_path / "run")
    parsed = Parser(page_of(folder))
    assert parsed.headings == headings and parsed.open == []
    assert parsed.names.isdisjoint({"script", "link", "iframe", "object"})
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    style = page.STYLE.read_text()
    assert "url(" not in style and "@import" not in style


def test_settings_that_differ_stand_beside_their_defaults(tmp_path):
    text = page_of(made.pretraining(tmp_path / "run"))
    changed, same = text.split("have their defaults")
    assert "3 differ from the defaults" in changed
    assert "<td><code>epochs</code></td><td>12</td><td>100</td>" in changed
    assert "<td><code>seed</code>" not in changed and "<dt>seed</dt>" in same


def test_a_sweep_shows_in_what_its_runs_differ(tmp_path):
    text = page_of(made.sweep(tmp_path / "sweep"))
    varied, shared = text.split("2 differ from the defaults in all runs")
    assert "<td><code>seed</code></td><td>0, 1</td>" in varied and "<code>out_dir</code>" not in varied
    assert "<td><code>epochs</code></td><td>6</td><td>3000</td>" in shared and "<dt>batch_size</dt><dd>4</dd>" in shared


@pytest.mark.parametrize(
    "values, words",
    [
        ({}, "None differs from scripts/demo.sh"),
        ({"lr": 1e-3}, "1 differs from scripts/demo.sh"),
        ({"lr": 1e-3, "epochs": 5}, "2 differ from scripts/demo.sh"),
    ],
)
def test_settings_are_compared_with_the_recipe(tmp_path, values, words):
    folder = made.pretraining(tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["settings"] = [row | {"recipe": values.get(row["name"], row["value"])} for row in record["settings"]]
    made.write_json(folder / "run.json", record | {"recipe": "scripts/demo.sh"})
    text = page_of(folder)
    assert words in text
    for name, value in values.items():
        assert (
            f"<td><code>{name}</code></td>" in text.split("differ from the defaults")[0] and f"<td>{value}</td>" in text
        )


def test_the_first_screen_has_result_verdict_and_time(tmp_path):
    first = page_of(made.pretraining(tmp_path / "run")).split("<section>")[0]
    for words in (
        "GL-MAE pretraining",
        "12 of 12",
        "1.38 dB",
        "30 s",
        "epoch 12: the stream grows",
        "1 update,",
    ):
        assert words in first
    first = page_of(made.finetuning(tmp_path / "fine")).split("<section>")[0]
    assert "0.600" in first and "0.500 to 0.700" in first and "No update was skipped" in first


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda run: (run / "warnings.jsonl").write_text(""), "all values are in their ranges"),
        (
            lambda run: made.write_lines(run / "warnings.jsonl", [{"epoch": 2, "kind": "a"}]),
            "1 kind of warning",
        ),
        (lambda run: made.pretraining(run, epochs=4), "the stream grows"),
    ],
)
def test_the_verdict_is_that_of_the_last_measurement(tmp_path, change, words):
    folder = made.pretraining(tmp_path / "run")
    (folder / "anomalies.jsonl").unlink()
    change(folder)
    assert words in text_of(folder)


def test_a_short_run_is_not_checked(tmp_path):
    folder = made.pretraining(tmp_path / "run", epochs=3)
    for name in ("warnings.jsonl", "anomalies.jsonl"):
        (folder / name).unlink()
    assert "the checks start at update 100." in text_of(folder)


def test_the_worst_case_comes_first(tmp_path):
    text = page_of(made.finetuning(tmp_path / "run"))
    table = text[text.index("Worst cases") :]
    assert table.index(made.LONG) < table.index("alert(1)") < table.index("case_a")
    assert "liver: missed, spleen: missed" in table


def test_a_classification_names_the_cases_that_are_wrong(tmp_path):
    text = text_of(made.classification(tmp_path / "run"))
    assert "0.667" in text and "0.200 to 1.000" in text and "Wrong: 1 of 3 cases" in text
    assert made.NASTY in text.partition("Wrong: ")[2]


def test_held_out_values_are_named_as_such_only_where_they_are(tmp_path):
    assert "rec_global, held-out" in text_of(made.pretraining(tmp_path / "run"))
    text = text_of(made.pretraining(tmp_path / "all", held_out=0))
    assert "held-out" not in text and "rec_global, training volumes" in text


def test_only_the_paper_of_the_method_is_cited(tmp_path):
    text = text_of(made.pretraining(tmp_path / "run"))
    assert "Global-Local" in text and "Mask in Mask" not in text and "commit 0123abcd" in text
    text = text_of(made.finetuning(tmp_path / "fine"))
    assert "Global-Local" in text and "Mask in Mask" in text


def test_a_card_beside_the_run_is_shown_if_it_is_its_own(tmp_path):
    folder = made.finetuning(tmp_path / "demo/finetune")
    shutil.rmtree(folder / "scores")
    made.score_card(tmp_path / "demo/scores", checkpoint=str(folder / "checkpoint-last.pth"))
    assert "Worst cases" in text_of(folder)
    made.score_card(tmp_path / "demo/scores", checkpoint=str(tmp_path / "other/checkpoint-last.pth"))
    assert "Worst cases" not in text_of(folder)


# ---------------------------------------------------------------- safety


def test_text_is_escaped_and_html_is_not():
    element = tag("p", "<b>", tag("i", made.NASTY), None, title=made.NASTY, class_="a&b")
    assert element.count("<") == 4 and isinstance(element, Html)
    assert "&lt;b&gt;" in element and 'class="a&amp;b"' in element and '"quoted' not in element


def test_names_cannot_add_markup(tmp_path):
    """Names of cases, classes, settings and losses, in texts and attributes."""
    folder = made.finetuning(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    made.write_lines(folder / "log.jsonl", [line | {made.NASTY: 1.0} for line in lines])
    record = json.loads((folder / "run.json").read_text())
    record["about"]["title"] = record["settings"][0]["name"] = made.NASTY
    made.write_json(folder / "run.json", record)
    shutil.copy(folder / "scores/worst/1-case_c.png", folder / "scores/worst/2-<script>.png")
    parsed = Parser(page_of(folder))
    assert "script" not in parsed.names and parsed.open == []
    assert sum(made.NASTY in text for text in parsed.texts) >= 4


# ---------------------------------------------------------------- what is missing


def test_each_missing_file_is_named_in_one_line(tmp_path):
    folder = made.pretraining(tmp_path / "run")
    for name in ("run.json", "log.jsonl"):
        (folder / name).unlink()
    parsed = Parser(page_of(folder))
    missing = [text for text in parsed.texts if text.startswith("Not shown")]
    assert len(missing) == 2 and "run.json" in missing[0] and "log.jsonl" in missing[1]
    assert parsed.headings == ["Reconstructions", "Settings", "How to cite"]


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, "\x00", '{"about": {}}'])
def test_damaged_files_do_not_stop_the_page(tmp_path, content):
    for name in ("run.json", "scores/scores.json", "log.jsonl", "warnings.jsonl", "scores/scores.csv"):
        folder = made.finetuning(tmp_path / name.replace("/", "-"))
        (folder / name).write_text(content)
        assert Parser(page_of(folder)).open == []


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = made.pretraining(tmp_path / "run")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"epoch": 12, "st')
    assert "12 of 12" in text_of(folder) and "cannot be read" not in text_of(folder)


def test_a_sweep_without_results_lists_its_runs(tmp_path):
    folder = made.sweep(tmp_path / "sweep")
    (folder / "sweep.json").unlink()
    text = text_of(folder)
    assert "2 of 2" in text and "scored" in text and "sweep.json is missing" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    made.pretraining(tmp_path / "pre")
    with pytest.raises(InputError, match="not the folder of a run .*did you mean .*/pre"):
        program.main([str(tmp_path)])
    with pytest.raises(InputError, match="no such folder"):
        program.main([str(tmp_path / "nothing")])
    with pytest.raises(InputError, match="--watch 0: must be"):
        program.main([str(tmp_path / "pre"), "--watch", "0"])
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the following arguments are required: RUN_DIR"),
        (["run", "--foo"], "unrecognized arguments: --foo"),
        (["run", "--watch", "often"], "argument --watch: invalid float value: 'often'"),
        (["run", "--out"], "argument --out: expected one argument"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(capsys, words, message):
    assert run_program(lambda: program.main(words)) == 2
    assert capsys.readouterr() == ("", f"error: {message}; --help lists the arguments\n")


# ---------------------------------------------------------------- writing


def test_the_page_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    folder = made.pretraining(tmp_path / "run")
    before = page_of(folder)

    def fail(run):
        raise RuntimeError

    monkeypatch.setattr(program, "footer", fail)
    with pytest.raises(RuntimeError):
        page_of(folder)
    assert (folder / "report.html").read_text() == before
    assert not list(folder.glob(".report*"))


def test_the_page_goes_where_it_is_asked_to(tmp_path, capsys):
    folder = made.pretraining(tmp_path / "run")
    program.main([str(folder), "--out", str(tmp_path / "pages/one.html")])
    assert (tmp_path / "pages/one.html").exists() and not (folder / "report.html").exists()
    assert 'http-equiv="refresh"' not in (tmp_path / "pages/one.html").read_text()


def test_a_change_of_the_run_makes_a_new_page(tmp_path, monkeypatch):
    """The page refreshes itself while it is watched; the last one does not."""
    folder = made.pretraining(tmp_path / "run")
    seen = []

    def sleep(seconds):
        """Look at the page instead of waiting, then add an epoch, and end after the third look."""
        seen.append((folder / "report.html").read_text())
        if len(seen) == 1:
            line = made.speed(12) | {"rec_global": 0.25}
            with open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        program.main([str(folder), "--watch", "5"])
    assert [bool(re.search("13 of 12", text)) for text in seen] == [False, True, True]
    assert all('<meta http-equiv="refresh" content="5">' in text for text in seen)
    assert "http-equiv" not in (folder / "report.html").read_text()


def test_the_page_itself_is_no_change(tmp_path):
    folder = made.pretraining(tmp_path / "run")
    before = runs.signature(folder, folder / "report.json")
    (folder / "report.json").write_text("{}")
    (folder / "checkpoint-last.pth").write_text("weights")
    assert runs.signature(folder, folder / "report.json") == before
    made.write_png(folder / "reconstruction-99.png")
    assert runs.signature(folder, folder / "report.json") != before
