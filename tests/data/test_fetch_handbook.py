import json
import random

import pytest

from moe.data.fetch_handbook import PACKAGES, extract, fetch_handbook
from moe.data.html_text import is_english_prose, is_japanese_prose, visible_lines
from moe.data.split import is_heldout
from moe.errors import InputError

JA_WORDS = [f"{kanji}{kana}" for kanji in "設定保存起動項目文書印刷削除" for kana in "をにはがでとも"]
EN_WORDS = [
    f"{first}{last}" for first in ("set", "file", "print", "page", "text") for last in ("ing", "er", "s")
]


def _sentence(language, number):
    """A sentence that differs from every other, as prose does."""
    choice = random.Random(number)
    if language.startswith("ja"):
        return "".join(choice.choices(JA_WORDS, k=20)) + "。"
    return " ".join(choice.choices(EN_WORDS, k=20)) + "."


def _page(language, numbers):
    body = "".join(f"<p>{_sentence(language, number)}</p>\n" for number in numbers)
    return f"<html><head><title>T</title><script>var x</script></head><body>{body}</body></html>"


@pytest.fixture
def unpacked(tmp_path):
    """Packages as `dpkg-deb -x` leaves them: 60 parallel help pages, one of each handbook, the licences."""
    root = tmp_path / "root"
    for package in PACKAGES:
        (root / "usr/share/doc" / package).mkdir(parents=True)
        (root / "usr/share/doc" / package / "copyright").write_text(f"licence of {package}")
    for n in range(60):
        for language in ("ja", "en-US"):
            path = root / f"usr/share/libreoffice/help/{language}/text/scalc/page{n}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_page(language, range(3 * n, 3 * n + 3)))
    for language in ("ja-JP", "en-US"):
        path = root / f"usr/share/doc/debian-handbook/html/{language}/index.html"
        path.parent.mkdir(parents=True)
        path.write_text(_page(language, [0, 1, 900]))
    return root


def _read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pages_become_documents_and_licences_are_kept(unpacked, tmp_path):
    out = tmp_path / "out"
    report = extract(unpacked, out)
    assert sorted(path.name for path in out.glob("*.jsonl")) == [
        "en.heldout.jsonl",
        "en.train.jsonl",
        "ja.heldout.jsonl",
        "ja.train.jsonl",
    ]
    for text in report.texts:
        documents = _read(text.path)
        assert len(documents) == text.documents > 0
        assert sum(len(document["text"].encode()) for document in documents) == text.text_bytes
    assert [path.read_text() for path in report.licences] == [f"licence of {name}" for name in PACKAGES]
    page = next(page for page in _read(out / "ja.train.jsonl") if page["name"].endswith("page1.html"))
    assert page["text"] == "".join(_sentence("ja", number) + "\n" for number in (3, 4, 5))


def test_a_page_and_its_translation_are_in_the_same_split(unpacked, tmp_path):
    extract(unpacked, tmp_path / "out")
    pages = {
        language: {
            document["name"].split("/text/")[-1].split("#")[0]
            for document in _read(tmp_path / "out" / f"{language}.heldout.jsonl")
        }
        for language in ("ja", "en")
    }
    assert pages["ja"] <= {f"scalc/page{n}.html" for n in range(60)}
    assert pages["ja"] == pages["en"]


def test_a_line_that_occurs_twice_is_kept_once(unpacked, tmp_path):
    extract(unpacked, tmp_path / "out")
    for language in ("ja", "en"):
        lines = [
            line
            for split in ("train", "heldout")
            for document in _read(tmp_path / "out" / f"{language}.{split}.jsonl")
            for line in document["text"].splitlines()
        ]
        assert len(lines) == len(set(lines)) > 100


def test_held_out_pages_share_no_run_of_words_with_training(unpacked, tmp_path):
    shared = " ".join(f"common{n}" for n in range(13))
    for path in unpacked.glob("usr/share/libreoffice/help/en-US/text/scalc/*.html"):
        path.write_text(path.read_text().replace("</body>", f"<p>{path.stem} {shared}</p></body>"))
    extract(unpacked, tmp_path / "out")
    assert shared in (tmp_path / "out" / "en.train.jsonl").read_text()
    assert shared not in (tmp_path / "out" / "en.heldout.jsonl").read_text()


def test_missing_licence_is_refused(unpacked, tmp_path):
    (unpacked / "usr/share/doc/debian-handbook/copyright").unlink()
    with pytest.raises(InputError, match="debian-handbook has no licence"):
        extract(unpacked, tmp_path / "out")


def test_other_layout_is_refused(unpacked, tmp_path):
    (unpacked / "usr/share/libreoffice").rename(unpacked / "usr/share/office")
    with pytest.raises(InputError, match="no ja pages"):
        extract(unpacked, tmp_path / "out")


def test_missing_apt_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        InputError, match=r"apt-get and dpkg-deb not found.*Debian or Ubuntu.*moe data prepare"
    ):
        fetch_handbook(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failing_apt_is_reported_with_its_last_words(tmp_path, monkeypatch):
    for tool in ("apt-get", "dpkg-deb"):
        program = tmp_path / tool
        program.write_text(
            "#!/bin/sh\necho 'W: aside' >&2\necho 'E: Unable to locate package' >&2\nexit 100\n"
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(InputError, match=r"exit code 100: E: Unable to locate.*apt-get update"):
        fetch_handbook(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_visible_lines_keep_sentences_whole_and_drop_what_is_not_text():
    html = (
        "<head><title>no</title></head><nav>no</nav><script>no()</script><h1>Head &amp; line</h1>"
        "<p>One <b>bold</b>\n  <code>word</code>, two.</p><pre>listing</pre>"
        "<ul><li>a<li>b</ul><style>no</style>last<br>line"
    )
    assert visible_lines(html) == ["Head & line", "One bold word, two.", "a", "b", "last", "line"]


@pytest.mark.parametrize(
    ("line", "japanese", "english"),
    [
        ("これは十五文字以上の日本語の文です。", True, False),
        ("これは短い文です。", False, False),
        ("apt-get update apt-get upgrade を実行して", False, False),
        ("This sentence has more than six words and forty letters.", False, True),
        ("Only five quite long words aaaaaaaaaaaaaaaaaa", False, True),
        ("incomprehensibilities internationalization words", False, False),
        ("Too short but has many words", False, False),
    ],
)
def test_prose_is_told_from_menus(line, japanese, english):
    assert (is_japanese_prose(line), is_english_prose(line)) == (japanese, english)


def test_fixture_has_pages_in_both_splits():
    names = [f"usr/share/libreoffice/help/*/text/scalc/page{n}.html" for n in range(60)]
    assert 0 < sum(map(is_heldout, names)) < 20
