"""Judged benchmarks against an endpoint that answers, fails, stalls, refuses and talks nonsense.

pip install lmms-eval==0.7.3        # an extra: without it these tests are skipped
"""

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import datasets
import pytest
from conftest import film
from launching import ROOT, command
from PIL import Image

from nanollava.evaluate import Answer, read_lines
from nanollava.sources import import_file

pytest.importorskip("lmms_eval", reason="the extra `eval` is not installed")
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

from nanollava.ablations.rows import TABLES  # noqa: E402
from nanollava.benchmarks import blog, judge, lmms  # noqa: E402

MANAGER = TaskManager("ERROR", include_path=str(ROOT / "recipes/eval"))
utils = import_file(str(ROOT / "recipes/eval/utils.py"))
PNGS = []
for i in range(3):
    Image.effect_noise((90, 60 + i), 90).save(file := io.BytesIO(), "PNG")
    PNGS.append(b"no image" if i == 1 else file.getvalue())
load_dataset = datasets.load_dataset
GOOD = "A fine caption.\nFinal Score: 80"


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """A server with a list of what it says next, in turn; it keeps what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            told = server.says[(len(server.asked) - 1) % len(server.says)]
            if told == "stall":
                time.sleep(1.5)
            code = {"fail": 500, "stall": 500, "filter": 400}.get(told, 200)
            reply = {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "fake-2024",
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": told},
                    }
                ],
            }
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.says = [], [GOOD]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for key, value in {
        "OPENAI_API_URL": f"http://127.0.0.1:{server.server_port}/v1",
        "OPENAI_API_KEY": "x",
        "MODEL_VERSION": "fake",
        "JUDGE_SECONDS": "0.5",
        "HF_HOME": str(tmp_path / "hub"),
        "NANOLLAVA_JUDGED": str(tmp_path / "judged.jsonl"),
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    judge.server.cache_clear()
    judge.kept_judgements.cache_clear()
    judge.failures.clear()
    yield server
    server.shutdown()


def ask(text, read=utils.final_score, **more):
    return judge.judge([{"role": "user", "content": text}], read, **more)


def test_a_judgement_is_asked_for_once(endpoint, tmp_path, monkeypatch):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    assert ask("a").points == 80 and ask("a").points == 80 and len(endpoint.asked) == 1
    ask("b")
    ask("a", images=[red])
    ask("a", images=[blue])
    ask("a", images=[red])
    assert len(endpoint.asked) == 4, "the text, and each image"
    judge.kept_judgements.cache_clear()  # another process
    assert ask("b") == judge.Judgement("judged", 80, GOOD, "fake-2024")
    assert len(endpoint.asked) == 4 and len(read_lines(tmp_path / "judged.jsonl")) == 4
    monkeypatch.setenv("MODEL_VERSION", "another")
    ask("b")
    assert len(endpoint.asked) == 5 and endpoint.asked[-1]["model"] == "another"


def test_keys_of_kept_judgements_do_not_change(endpoint, monkeypatch):
    """Old files of judgements stay valid: a key is a hash of what was asked, whom, and where."""
    monkeypatch.setenv("OPENAI_API_URL", "http://e/v1")
    provider = judge.server("fake", "openai", "", 1)
    monkeypatch.setattr(judge, "server", lambda *_: provider)
    monkeypatch.setattr(
        provider, "evaluate", lambda _: SimpleNamespace(content=GOOD, model_used="")
    )
    ask("a")
    ask("c", max_new_tokens=64)
    assert [*judge.kept_judgements(judge.judgements_file())] == [
        "ad5db399675b7afae129f693",
        "ddac0175e62538a65001448f",
    ]


@pytest.mark.parametrize(
    "says, state",
    [
        (GOOD, "judged"),
        ("", "refused"),
        ("I like it.", "unreadable"),
        ("Final Score: 200", "unreadable"),
        ("fail", "failed"),
        ("stall", "failed"),
        (None, "refused"),
        ("filter", "refused"),
    ],
)
def test_what_is_no_score_is_none(endpoint, says, state):
    endpoint.says = [says]
    found = ask("a")
    assert found.state == state and (found.points is None) == (state != "judged")
    assert len(endpoint.asked) == (4 if state == "failed" else 1), "four tries"
    assert (
        utils.results(found)[state] == 1 and sum(utils.results(found)[s] for s in blog.STATES) == 1
    )


def test_an_endpoint_that_is_down_is_not_asked_for_ever(endpoint, tmp_path):
    ask("kept")
    endpoint.says = ["fail"]
    assert [ask(f"{i}").state for i in range(2)] == ["failed"] * 2
    assert ask("2").state == "failed"
    before = len(endpoint.asked)
    for _ in range(2):  # lmms-eval may try again
        with pytest.raises(
            ValueError, match=r"3 times in a row.*1 judgements are kept in.*run it again"
        ):
            ask("3")
    assert len(endpoint.asked) == before and ask("kept").points == 80
    judge.failures.clear()  # another run
    endpoint.says = [GOOD]
    assert ask("0").points == 80, "what failed is asked again"


@pytest.mark.parametrize(
    "read, text, score",
    [
        (utils.final_score, "Final Score: 85", 85),
        (utils.final_score, "**Final Score: 7.5**", 7.5),
        (utils.final_score, "Final Score: **90**", 90),
        (utils.final_score, "Score: 85", None),
        (utils.detail_score, "{'score': 4}", 4),
        (utils.detail_score, '{"score": "3"}', 3),
        (utils.detail_score, "{'score': 4.8}", 4.8),
        (utils.detail_score, "{'score': 9}", None),
        (utils.detail_score, "4", None),
    ],
)
def test_scores_are_read(read, text, score):
    assert read(text) == score


def run(task, answers, monkeypatch):
    """A task by lmms-eval's evaluator, with these answers."""

    def answer_all(assistant, writer, items, room, title, keep):
        for item in items:
            keep(item, Answer(answers[item.place]))

    monkeypatch.setattr(lmms, "answer_all", answer_all)
    return simple_evaluate(
        model="nanollava",
        tasks=[task],
        task_manager=MANAGER,
        batch_size=1,
        bootstrap_iters=0,
        model_args=f"pretrained={ROOT}/demo/nano",
    )["results"][task]


def test_images_of_ones_own(endpoint, tmp_path, monkeypatch):
    folder = tmp_path / "data/image_dc_en"
    folder.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (60, 40), (60 * i, 0, 0)).save(folder / f"{i}.png")
    endpoint.says = ["Final Score: 80", "Sorry.", "Final Score: 40", ""]
    found = run("image_dc_own_en", [f"caption {i}" for i in range(4)], monkeypatch)
    assert found["judge_score,none"] == 60, "the mean of what was judged"
    states = {s: found[f"{s},none"] for s in blog.STATES}
    assert states == {"judged": 2, "refused": 1, "unreadable": 1, "failed": 0}
    text, image = endpoint.asked[0]["messages"][0]["content"]
    assert "caption" in text["text"] and "Final Score" in text["text"]
    kept = (tmp_path / "judged.jsonl").read_text()
    assert kept.count("caption") == 4 and "base64" not in kept, "prompts are kept, images are not"
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")


def local(monkeypatch, split, rows):
    found = datasets.DatasetDict({split: datasets.Dataset.from_list(rows)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found.copy())


def test_videos(endpoint, tmp_path, monkeypatch):
    local(
        monkeypatch,
        "test",
        [
            {"video_name": f"v_{i}", "question": f"what, {i}?", "answer": f"true {i}"}
            for i in range(2)
        ],
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda **_: str(tmp_path))
    monkeypatch.setattr("lmms_eval.api.task.snapshot_download", lambda **_: str(tmp_path))
    folder = tmp_path / "hub/videochatgpt/Test_Videos"
    folder.mkdir(parents=True)
    for i in range(2):
        (folder / f"v_{i}.mp4").write_bytes(film(5))
    endpoint.says = ["{'score': 4}", "{'score': 3}"]
    found = run("video_dc_2024", ["said 0", "said 1"], monkeypatch)
    assert found["judge_score,none"] == 3.5 and found["judged,none"] == 2
    asked = sorted(endpoint.asked, key=lambda body: body["messages"][1]["content"])
    for i, body in enumerate(asked):  # scored in threads, each with its own
        system, user = body["messages"]
        assert all(x in user["content"] for x in (f"what, {i}?", f"true {i}", f"said {i}"))
        assert system["role"] == "system" and body["temperature"] == 0


def test_llava_in_the_wild(endpoint, monkeypatch):
    rows = [
        {
            "question_id": i,
            "question": f"q{i}",
            "image": Image.new("RGB", (20, 20)),
            "caption": [f"seen {i}"],
            "gpt_answer": f"true {i}",
            "category": "conv",
            "image_id": "1",
        }
        for i in range(3)
    ]
    local(monkeypatch, "train", rows)
    endpoint.says = ["8 6\nbecause", "10 6\nbecause", "no numbers"]
    found = run("llava_w_2024", ["a", "b", "c"], monkeypatch)
    assert found["judge_score,none"] == pytest.approx(100 * 12 / 18)
    assert found["unreadable,none"] == 1
    sent = sorted(body["messages"][-1]["content"] for body in endpoint.asked)
    for i, text in enumerate(sent):
        assert all(
            x in text for x in (f"seen {i}", f"q{i}", f"true {i}", f"[Assistant 2]\n{'abc'[i]}")
        )


# ---- the command


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A run to be scored, and how often its model was asked."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(ROOT / "demo/nano", run)
    asked, answer_all = [], lmms.answer_all

    def counted(assistant, writer, items, *more):
        asked.append(len(items))
        return answer_all(assistant, writer, items, *more)

    monkeypatch.setattr(lmms, "answer_all", counted)
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "question": f"What, {i}?",
            "image": Image.new("RGB", (90, 60), (i, 0, 0)),
            "answers": ["a"],
            "questionId": f"{i}",
        }
        for i in range(4)
    ]
    local(monkeypatch, "validation", rows)
    return run, asked


def test_what_was_scored_and_answered_is_not_done_again(mine, capsys):
    run, asked = mine
    lmms.run_benchmarks(run, ["docvqa"], 2)
    lmms.run_benchmarks(run, ["docvqa_val"], 2)
    assert asked == [2] and len(read_lines(run / "benchmarks.jsonl")) == 1
    told = capsys.readouterr().out
    assert "58.8" in told and "docvqa_val: the first 2" in told
    lmms.run_benchmarks(run, ["docvqa"])
    assert asked == [2, 2], "of four questions two were answered before"
    (run / "benchmarks.jsonl").unlink()
    lmms.run_benchmarks(run, ["docvqa"], 2, beside="T4:4")
    assert asked == [2, 2] and "62.7" in capsys.readouterr().out


def test_what_cannot_be_scored_is_named_and_the_rest_is_scored(mine, capsys, monkeypatch):
    run, _ = mine
    for key in ("OPENAI_API_KEY", "MODEL_VERSION"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("JUDGE_PRICE", "2,10")
    lmms.run_benchmarks(run, ["llava_w", "image_dc_en", "pope", "docvqa"], 4)
    told = capsys.readouterr().out
    assert "llava_w_2024: the judge is asked at most 4 questions" in told and "$0.0" in told
    assert "llava_w_2024: this task needs a judge: set MODEL_VERSION" in told
    assert (
        "image_dc_own_en: this task needs images of yours: put them into data/image_dc_en" in told
    )
    assert "pope: KeyError('test')" in told, "its split is another"
    assert "docvqa_val: the first 4" in told


def test_an_unreadable_image_is_wrong_and_named(mine, capsys, monkeypatch):
    run, _ = mine
    rows = [
        {
            "question": f"What, {i}?",
            "image": {"bytes": data, "path": None},
            "answers": ["a"],
            "questionId": f"{i}",
        }
        for i, data in enumerate(PNGS)
    ]
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "image": datasets.Image(),
            "answers": datasets.List(datasets.Value("string")),
            "questionId": datasets.Value("string"),
        }
    )
    found = datasets.DatasetDict(
        {"validation": datasets.Dataset.from_list(rows, features=features)}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found.copy())
    lmms.run_benchmarks(run, ["docvqa"])
    told = " ".join(capsys.readouterr().out.split())
    assert "docvqa_val: 1 unreadable, counted as wrong: docvqa_val 1" in told
    (row,) = read_lines(run / "benchmarks.jsonl")
    assert row["values"]["n"] == 3


def test_data_without_a_column_have_no_score(mine, capsys, monkeypatch):
    run, _ = mine
    local(monkeypatch, "validation", [{"question": "q", "image": Image.new("RGB", (9, 9))}])
    lmms.run_benchmarks(run, ["docvqa"])
    told = capsys.readouterr().out
    assert "docvqa_val: its data have the columns ['question']; expected 'answers'" in told


def test_failures_are_no_score_and_asked_again(mine, endpoint, capsys, tmp_path, monkeypatch):
    run, _ = mine
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)  # its own again
    folder = tmp_path / "data/image_dc_en"
    folder.mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (60, 40), (20 * i, 0, 0)).save(folder / f"{i}.png")
    endpoint.says = ["fail"]
    lmms.run_benchmarks(run, ["image_dc_en"])
    told = capsys.readouterr().out
    assert "image_dc_own_en: fake did not answer 3 times in a row" in told
    assert not read_lines(run / "benchmarks.jsonl")
    before = len(endpoint.asked)
    assert before <= 4 * (3 + 3), "four threads: three may be under way when the third fails"
    judge.failures.clear()
    endpoint.says = [GOOD]
    lmms.run_benchmarks(run, ["image_dc_en"])
    told = capsys.readouterr().out
    assert "80.0" in told and "12 judged by fake-2024" in told
    (row,) = read_lines(run / "benchmarks.jsonl")
    assert row["judge"] == "fake" and row["values"]["judges"] == ["fake-2024"]
    Image.new("RGB", (60, 40), "blue").save(folder / "12.png")
    lmms.run_benchmarks(run, ["image_dc_en"])
    assert len(endpoint.asked) == before + 13, "other images, another score; one question is new"


def test_names_and_rows_that_are_none(mine):
    run, _ = mine
    with pytest.raises(ValueError, match=r"\['chartq'\]; close to the first: \['chartqa'"):
        lmms.run_benchmarks(run, ["docvqa", "chartq"])
    with pytest.raises(ValueError, match="TABLE:ROW, like T4:0"):
        lmms.run_benchmarks(run, ["docvqa"], beside="T4:99")


def test_the_blogs_columns_are_tasks_and_its_units():
    columns = {name for table in TABLES.values() for name in table["metrics"]} - {
        "avg",
        "scienceqa",
    }
    assert columns == {*blog.BLOG}
    assert {column.task for column in blog.BLOG.values()} <= {*MANAGER.all_tasks}
    value = blog.value_of
    mme = {"mme_perception_score": 1400.0, "mme_cognition_score": 280.0}
    assert value(blog.BLOG["mme"], mme) == pytest.approx(60)
    assert value(blog.BLOG["synthdog"], {"tree_edit_distance": 418.5}) == 418.5
    assert value(blog.BLOG["ocrbench"], {"ocrbench_accuracy": 0.5}) == 50
    assert value(blog.BLOG["video_dc"], {"judge_score": 3.2}) == 64
    assert value(blog.BLOG["pope"], {}) is None


def test_two_processes_judge_their_shares(mine, endpoint, tmp_path):
    run, _ = mine
    folder = tmp_path / "data/image_dc_en"
    folder.mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (60, 40), (20 * i, 0, 0)).save(folder / f"{i}.png")
    told = command(
        "-m",
        "composer.cli.launcher",
        "-n",
        2,
        "-m",
        "nanollava",
        "evaluate",
        run,
        "--tasks",
        "image_dc_en",
        cwd=tmp_path,
    )
    assert "5 judged by fake-2024" in told and len(endpoint.asked) == 5
    (row,) = read_lines(run / "benchmarks.jsonl")
    assert row["values"]["n"] == 5 and row["values"]["judge_score"] == 80
    kept = [len(read_lines(tmp_path / f"judged{rank}.jsonl")) for rank in ("", 1)]
    assert sum(kept) == 5 and all(kept)
