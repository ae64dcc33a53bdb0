"""nanollava in lmms-eval's own evaluator: its tasks as they are, rows with exactly their columns.

pip install lmms-eval==0.7.3        # an extra: without it these tests are skipped
"""

import io
import json
import random
from types import SimpleNamespace

import datasets
import pytest
from conftest import film
from launching import ROOT, command
from PIL import Image

from nanollava import metrics
from nanollava.evaluate import Answer, read_lines
from nanollava.prompts import Turn
from nanollava.sources import import_file

pytest.importorskip("lmms_eval", reason="the extra `eval` is not installed")
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

from nanollava.benchmarks import lmms  # noqa: E402

world = import_file(str(ROOT / "recipes/nano/world.py"))
MANAGER = TaskManager("ERROR", include_path=str(ROOT / "recipes/eval"))
DEMO = f"pretrained={ROOT}/demo/nano"
SINGLE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def page(i: int) -> Image.Image:
    *_, record = world.doc("test", i + 1, 0)
    return Image.open(io.BytesIO(record["image"]))


def vqa(i, **more):
    return {"question": f"What is it, {i}?", "image": page(i), "answers": [f"word{i}"] * 10, **more}


SYNTHDOG = (
    "OCR this image section by section, from top to bottom, and left to right. Do not insert line "
    "breaks in the output text. If a word is split due to a line break in the image, use a space "
    "instead."
)
ROWS = {  # task: (split, row i, the question as the model is asked it, a right answer, its metric)
    "docvqa_val": (
        "validation",
        lambda i: vqa(i, questionId=str(i)),
        "What is it, 1?" + SINGLE,
        "word1",
        "anls",
    ),
    "infovqa_val": (
        "validation",
        lambda i: vqa(i, questionId=str(i)),
        "What is it, 1?" + SINGLE,
        "word1",
        "anls",
    ),
    "chartqa": (
        "test",
        lambda i: {
            "question": f"How much, {i}?",
            "image": page(i),
            "answer": f"{i}5",
            "type": "human_test",
        },
        "How much, 1?\nAnswer the question with a single word.",
        "15",
        "relaxed_overall",
    ),
    "ai2d": (
        "test",
        lambda i: {
            "question": f"Which, {i}?",
            "image": page(i),
            "answer": "1",
            "options": ["cat", "dog", "cow"],
        },
        "Which, 1?\nA. cat\nB. dog\nC. cow" + LETTER,
        "B.",
        "exact_match",
    ),
    "scienceqa_img": (
        "test",
        lambda i: {
            "question": f"Which, {i}?",
            "image": page(i),
            "answer": 1,
            "choices": ["cat", "dog"],
            "hint": "They bark.",
        },
        "Context: They bark.\nWhich, 1?\nA. cat\nB. dog" + LETTER,
        "B",
        "exact_match",
    ),
    "pope": (
        "test",
        lambda i: {
            "question": f"Is there a dog, {i}?",
            "image": page(i),
            "answer": "yes",
            "id": str(i),
            "question_id": str(i),
            "category": "random",
            "image_source": "x",
        },
        "Is there a dog, 1?" + SINGLE,
        "yes",
        "pope_f1_score",
    ),
    "vizwiz_vqa_val": (
        "val",
        lambda i: vqa(i, question_id=str(i), category="other"),
        "What is it, 1?" + UNSURE + SINGLE,
        "word1",
        "exact_match",
    ),
    "ok_vqa_val2014": (
        "val2014",
        lambda i: vqa(i, question_id=str(i)),
        "What is it, 1?" + UNSURE + SINGLE,
        "word1",
        "exact_match",
    ),
    "ocrbench": (
        "test",
        lambda i: {
            "question": f"what is written, {i}?",
            "image": page(i),
            "answer": [f"word{i}"],
            "dataset": "IIIT5K",
            "question_type": "Regular Text Recognition",
        },
        "what is written, 1?",
        "word1",
        "ocrbench_accuracy",
    ),
    "synthdog_en": (
        "validation",
        lambda i: {
            "image": page(i),
            "ground_truth": json.dumps({"gt_parse": {"text_sequence": f"a page {i}"}}),
        },
        SYNTHDOG,
        "a page 1",
        "tree_edit_distance",
    ),
    "mme": (
        "test",
        lambda i: {
            "question_id": f"a/{i // 2}.png",
            "image": page(i),
            "question": f"Is it {i}? Please answer yes or no.",
            "category": "OCR",
            "answer": ("Yes", "No")[i % 2],
        },
        "Is it 1?" + SINGLE,
        "No",
        "mme_perception_score",
    ),
    "mmmu_val_2024": (
        "validation",
        lambda i: {
            "id": f"validation_Art_{i}",
            "image_1": page(i),
            "question": f"Which is it, {i}? <image 1>",
            "options": "['cat', 'dog']",
            "question_type": "multiple-choice",
            "answer": "B",
            "subfield": "x",
        },
        "Which is it, 1? <image 1>\nA. cat\nB. dog\n"
        "Answer with the option letter from the given choices directly.",
        "B",
        "mmmu_acc",
    ),
    "mathvista_testmini_direct": (
        "testmini",
        lambda i: {
            "pid": str(i),
            "question": f"How many, {i}?",
            "decoded_image": page(i),
            "answer": f"{i}",
            "question_type": "free_form",
            "answer_type": "integer",
            "choices": [],
            "unit": "",
            "precision": 0,
            "query": "",
            "metadata": {},
        },
        "How many, 1?\nAnswer the question using a single integer number.",
        "1",
        "accuracy",
    ),
    "cmmmu_val": (
        "val",
        lambda i: {
            "id": f"{i}",
            "type": "选择",
            "question": f'是什么，{i}？<img="a.png">',
            "answer": "AB"[i],
            "option1": "猫",
            "option2": "狗",
            "option3": "牛",
            "option4": "马",
            "subcategory": "x",
            "category": "艺术与设计",
            "image_1": page(i),
            **{f"image_{k}_filename": "a.png" if k == 1 else "none" for k in range(1, 6)},
        },
        "请回答以下多项选择题，并选出正确选项。这些题目可能包括单选和多选题型。"
        "如果所提供的信息不足以确定一个明确的答案，"
        "那么请根据可用的数据和你的判断来选择最可能正确的选项。\n\n问题：是什么，1？<图片 1>\n"
        "选项：\n(A) 猫\n(B) 狗\n(C) 牛\n(D) 马\n\n正确答案：\n",
        "B",
        "cmmmu_acc",
    ),
}
WRONG = {  # where lmms-eval guesses at what it cannot read
    "mmmu_val_2024": {0: "A", 1: "A"},
    "cmmmu_val": {0: "B", 1: "A"},
}


@pytest.fixture
def local(monkeypatch, tmp_path):
    """Datasets of the hub as two rows each; some tasks write a report to where one is."""
    monkeypatch.chdir(tmp_path)

    def give(task):
        split, row, *_ = ROWS[task]
        found = datasets.DatasetDict({split: datasets.Dataset.from_list([row(0), row(1)])})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found.copy())

    return give


def run(task, **more):
    return simple_evaluate(
        model="nanollava",
        tasks=[task],
        task_manager=MANAGER,
        batch_size=1,
        model_args=",".join([DEMO, *(f"{k}={v}" for k, v in more.items())]),
        bootstrap_iters=0,
    )


@pytest.mark.parametrize("task", ROWS)
def test_the_blogs_tasks_ask_in_their_words_and_tell_right_from_wrong(task, local, monkeypatch):
    local(task)
    _, row, question, right, metric = ROWS[task]
    best = {"mme": 200, "ocrbench": 2 / 1000, "synthdog_en": 2 * (1 - 1 / 9)}.get(task, 1)
    zero = row(0).get("answer", "") if task in ("chartqa", "cmmmu_val") else None
    right = {0: zero or right.replace("1", "0").replace("No", "Yes"), 1: right}
    wrong = WRONG.get(task, {0: "zebra", 1: "zebra"})
    for said, score in ((right, best), (wrong, 0)):
        seen = []

        def answer_all(assistant, writer, items, room, title, keep, said=said, seen=seen):
            for item in items:
                seen.append((item.turns, len(item.images), room))
                keep(item, Answer(said[item.place]))

        monkeypatch.setattr(lmms, "answer_all", answer_all)
        found = run(task)["results"][task]
        ((turn,), images, _), ((other,), *_) = seen
        assert images == turn.images == 1 and turn.text.startswith("<image>\n")
        assert other.text == f"<image>\n{question}"
        values = {k.split(",")[0]: v for k, v in found.items() if "stderr" not in k}
        assert values[metric] == pytest.approx(score), found


def test_answers_are_those_of_the_model_at_the_keys_asked_for(local):
    local("docvqa_val")
    import nanollava

    llava = nanollava.load(ROOT / "demo/nano")
    for grid in ("3x3", "base"):
        got = [
            s["filtered_resps"][0]
            for s in run("docvqa_val", max_grid=grid)["samples"]["docvqa_val"]
        ]
        asked = [vqa(i)["question"] + SINGLE for i in (0, 1)]
        assert got == [llava.chat(page(i), q, max_grid=grid) for i, q in enumerate(asked)]


def test_several_images_and_frames_are_told_apart_as_in_the_released_code(tmp_path):
    (tmp_path / "a.mp4").write_bytes(film(40))
    model = lmms.Nanollava(f"{ROOT}/demo/nano", max_frames=8)
    parts = [
        {"type": "image", "url": page(0)},
        {"type": "image", "url": page(1)},
        {"type": "text", "text": "which?"},
    ]
    model.task_dict = {
        "t": {
            "test": [
                parts,
                [
                    {"type": "video", "url": str(tmp_path / "a.mp4")},
                    {"type": "text", "text": "what?"},
                ],
            ]
        }
    }

    def ask(i):
        say = lambda doc: [{"role": "user", "content": doc}]  # noqa: E731
        return model.read(SimpleNamespace(args=("", say, {}, i, "t", "test")), i)

    question = ask(0)
    (turn,) = question.turns
    assert (question.kind, turn.text) == ("image", "<image> <image>\nwhich?")
    assert len(question.images) == turn.images == 2
    question = ask(1)
    (turn,) = question.turns
    assert (question.kind, turn.text, turn.images) == ("video", "<image>" * 8 + "\nwhat?", 8)
    lays = model.writers["video"]([turn], question.images, answer=True).layouts
    assert [x.tokens for x in lays] == [9] * 8, "6 x 6 become 3 x 3, as 27 x 27 become 14 x 14"
    assert {x.grid for x in lays} == {(0, 0)}


def test_keys_of_kept_answers_do_not_change():
    """Old files of answers stay valid: a key is a hash of the question and of what answers it."""
    model = lmms.Nanollava(f"{ROOT}/demo/nano")
    image = Image.new("RGB", (90, 60), "red")
    key = model.key("image", [Turn("user", "<image>\nwhat?", 1)], [image], 5)
    assert key == "7cb85991f9fe4868b04a58c5"
    assert model.key("video", [Turn("user", "what?", 0)], [], 1024) == "7833d724fb80d59e393130ea"


def test_an_unknown_key_is_named(local):
    local("docvqa_val")
    with pytest.raises(ValueError, match="max_gird"):
        run("docvqa_val", max_gird="3x3")


def theirs(file):
    """A file of lmms-eval's tasks."""
    import lmms_eval.tasks

    return import_file(f"{lmms_eval.tasks.__path__[0]}/{file}.py")


def test_our_metrics_are_lmms_evals():
    """On random answers: words, numbers, percents, case and spaces."""
    from lmms_eval.api.metrics import anls

    donut = theirs("synthdog/donut_evaluator").JSONParseEvaluator()
    chart = theirs("chartqa/utils")
    rng = random.Random(0)
    words = [
        "tax",
        "305",
        "Tax",
        "3.05",
        "5%",
        "0.05",
        "0",
        "0.0",
        "-2",
        "ROOM",
        "7",
        "1,000",
        ",",
        "%",
        ".",
        "yes",
        "_",
    ]
    for _ in range(3000):
        said, true = (
            rng.choice(" x").join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(2)
        )
        near = true[: rng.randint(0, len(true))] + rng.choice(("", "x", "5"))
        for p in (said, near, true, "", f" {true} "):
            assert metrics.anls(p, true) == pytest.approx(anls([true], [p])["anls"]), (p, true)
            assert metrics.relaxed(p, true) == chart.relaxed_correctness(p, true), (p, true)
    for _ in range(300):
        true = " ".join(rng.choices([*words, ""], k=rng.randint(1, 6)))
        said = true[: rng.randint(0, len(true))] + rng.choice(("", "x", "abc"))
        score = donut.cal_acc({"output": said.lower().strip()}, {"text_sequence": true})
        assert metrics.edit(said, true) == pytest.approx(max(0, score)), (said, true)


def test_two_processes_answer_what_one_does(tmp_path):
    """Each its share; `accelerate launch` starts no second process on a CPU, torchrun does."""
    rows = [vqa(i) | {"image": io.BytesIO(), "answer": f"word{i}"} for i in range(5)]
    for i, row in enumerate(rows):
        page(i).save(row["image"], "PNG")
        row["image"] = {"bytes": row["image"].getvalue(), "path": None}
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "image": datasets.Image(),
            "answer": datasets.Value("string"),
        }
    )
    rows = [{key: row[key] for key in features} for row in rows]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local.yaml").write_text(f"""
task: local
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.parquet}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.picture
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 5}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")
    (tmp_path / "tasks/utils.py").write_text("def picture(doc):\n    return [doc['image']]\n")

    def answers(n):
        launch = ("-m", "torch.distributed.run", "--nproc-per-node", n)
        command(
            *launch,
            "-m",
            "lmms_eval",
            "--model",
            "nanollava",
            "--tasks",
            "local",
            "--model_args",
            f"{DEMO},answers={tmp_path}/{n}",
            "--include_path",
            tmp_path / "tasks",
            cwd=tmp_path,
        )
        files = sorted((tmp_path / str(n)).glob("answers*.jsonl"))
        return len(files), {r["key"]: r["text"] for file in files for r in read_lines(file)}

    (one, alone), (two, shared) = answers(1), answers(2)
    assert (one, two) == (1, 2) and alone == shared and len(alone) == 5
