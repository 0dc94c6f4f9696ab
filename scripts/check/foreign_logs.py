"""Make logs of other tools on the embedded model, which the readers of such logs are tested with.

    python scripts/check/foreign_logs.py WORK prepare
    TOOLS/bin/python scripts/check/foreign_logs.py WORK inspect lm_eval lmms_eval documented
    python scripts/check/foreign_logs.py WORK collect tests/unit/storage/logs

``prepare`` writes eight questions and four images to describe, the embedded model with a chat template that writes our
prompt, and the answers of our own run. Each tool then answers the same questions; it is started as its users start it,
in an environment of its own (TOOLS, with inspect-ai, lm-eval, lmms-eval and xlsxwriter). ``documented`` writes our
answers as VLMEvalKit, an OpenAI batch and llama.cpp's server would, by their documented fields. ``collect`` copies the
logs; of the files of results, which describe the machine, it keeps the names of model and tool alone.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TASKS = {
    "pope": ["task=pope", "task.scenes=2", "task.per_scene=2", "task.subsets=[adversarial]"],
    "chair": ["task=chair", "task.scenes=4"],
}
LENGTH = 64
TEMPLATE = (
    "{% for message in messages %}USER: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %} ASSISTANT:{% endfor %}"
)
KEPT = ("model_name", "lm_eval_version", "lmms_eval_version")
SCORE = "def process_results(doc, results):\n    return {'chars': float(len(results[0]))}\n"
LMMS = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {task}.parquet}}}}
task: scenes_{task}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: label
process_results: !function utils.process_results
generation_kwargs: {{max_new_tokens: {length}, temperature: 0, do_sample: false}}
metric_list: [{{metric: chars, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 1.0}}]
"""
LM = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {task}.parquet}}}}
task: scenes_{task}
test_split: test
output_type: generate_until
doc_to_image: [image]
doc_to_text: "<image>{{{{question}}}}"
doc_to_target: label
process_results: !function utils.process_results
generation_kwargs: {{until: ["</s>"], max_gen_toks: {length}, temperature: 0, do_sample: false}}
metric_list: [{{metric: chars, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def prepare(work: Path) -> None:
    """Write questions with their images as Parquet, the model, and the answers of our own runs."""
    from datasets import Dataset, Features, Image, Value

    from stethoscope import testbed

    shutil.copytree(testbed.MODEL_DIR, work / "model", dirs_exist_ok=True)
    (work / "model" / "chat_template.jinja").write_text(TEMPLATE)
    scenes = {scene.id: scene for scene in testbed.scenes(4)}
    for task, settings in TASKS.items():
        command = [
            "evaluate",
            "model=testbed",
            "logger=none",
            *settings,
            f"generation.max_new_tokens={LENGTH}",
            f"run_dir=ours_{task}",
        ]
        subprocess.run([sys.executable, "-m", "stethoscope", *command], cwd=work, check=True)
        rows = [json.loads(line) for line in (work / f"ours_{task}" / "samples.jsonl").read_text().splitlines()]
        columns: dict[str, list[Any]] = {"id": [], "image": [], "question": [], "label": []}
        for row in rows:
            picture = io.BytesIO()
            scenes[row["group"]].image().save(picture, "png")
            columns["id"].append(row["sample_id"])
            columns["image"].append({"bytes": picture.getvalue(), "path": None})
            columns["question"].append(row["question"])
            columns["label"].append(row["reference"].get("label", "none"))
        text = Value("string")
        kinds = Features({"id": text, "image": Image(), "question": text, "label": text})
        Dataset.from_dict(columns, kinds).to_parquet(work / f"{task}.parquet")


# --- the tools, each started in WORK with its own interpreter ---------------------------------------------------------


def run_lmms_eval(work: Path) -> None:
    """Run lmms-eval's ``llava_hf`` on both tasks."""
    folder = work / "lmms_tasks"
    folder.mkdir(exist_ok=True)
    (folder / "utils.py").write_text(
        SCORE + "def images(doc):\n    return [doc['image'].convert('RGB')]\n"
        "def question(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n"
    )
    for task in TASKS:
        (folder / f"scenes_{task}.yaml").write_text(LMMS.format(task=task, length=LENGTH))
    _start(
        work, "lmms_eval", "--model", "llava_hf",
        "--model_args", "pretrained=model,device=cpu,device_map=cpu,dtype=float32",
        "--include_path", "lmms_tasks", "--tasks", ",".join(f"scenes_{task}" for task in TASKS), "--batch_size", "1",
        "--log_samples", "--output_path", "logs_lmms_eval",
    )  # fmt: skip


def run_lm_eval(work: Path) -> None:
    """Run lm-eval's ``hf-multimodal`` on both tasks."""
    folder = work / "lm_tasks"
    folder.mkdir(exist_ok=True)
    (folder / "utils.py").write_text(SCORE)
    for task in TASKS:
        (folder / f"scenes_{task}.yaml").write_text(LM.format(task=task, length=LENGTH))
    _start(
        work, "lm_eval", "--model", "hf-multimodal", "--device", "cpu",
        "--model_args", "pretrained=model,dtype=float32,image_string=<image>,convert_img_format=True",
        "--include_path", "lm_tasks", "--tasks", ",".join(f"scenes_{task}" for task in TASKS), "--batch_size", "1",
        "--apply_chat_template", "--log_samples", "--output_path", "logs_lm_eval",
    )  # fmt: skip


def _start(work: Path, *arguments: str) -> None:
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *arguments], cwd=work, check=True, env=settings)


def run_inspect(work: Path) -> None:
    """Run inspect_ai with a provider of our own, as its ``hf/`` provider reads no images."""
    import torch
    from datasets import load_dataset
    from inspect_ai import Task, eval  # type: ignore[import-not-found]
    from inspect_ai.dataset import MemoryDataset, Sample  # type: ignore[import-not-found]
    from inspect_ai.model import (  # type: ignore[import-not-found]
        ChatCompletionChoice,
        ChatMessageAssistant,
        ChatMessageUser,
        ContentImage,
        ContentText,
        Logprob,
        Logprobs,
        ModelAPI,
        ModelOutput,
        modelapi,
    )
    from inspect_ai.solver import generate  # type: ignore[import-not-found]
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(work / "model")
    model = AutoModelForImageTextToText.from_pretrained(work / "model").eval()

    class Testbed(ModelAPI):
        async def generate(self, input, tools, tool_choice, config):
            """Answer greedily, with log-probabilities."""
            image, text = input[-1].content
            picture = Image.open(io.BytesIO(base64.b64decode(image.image.partition(",")[2]))).convert("RGB")
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text.text}]}], tokenize=False
            )
            inputs = processor(images=picture, text=prompt, return_tensors="pt")
            settings = {"max_new_tokens": LENGTH, "return_dict_in_generate": True, "output_scores": True}
            with torch.inference_mode():
                output = model.generate(**inputs, do_sample=False, **settings)
            ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            values = [score[0].log_softmax(-1)[id_].item() for score, id_ in zip(output.scores, ids, strict=True)]
            tokens = [
                Logprob(token=processor.decode([id_]), logprob=value) for id_, value in zip(ids, values, strict=True)
            ]
            ended = ids[-1] == model.config.text_config.eos_token_id
            message = ChatMessageAssistant(content=processor.decode(ids, skip_special_tokens=True), source="generate")
            choice = ChatCompletionChoice(
                message=message, stop_reason="stop" if ended else "max_tokens", logprobs=Logprobs(content=tokens)
            )
            return ModelOutput(model="testbed", choices=[choice])

    modelapi(name="embedded")(Testbed)
    for task in TASKS:
        samples = []
        for row in load_dataset("parquet", data_files=str(work / f"{task}.parquet"), split="train"):
            picture = io.BytesIO()
            row["image"].save(picture, "png")
            address = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
            content = [ContentImage(image=address), ContentText(text=row["question"])]
            samples.append(Sample(input=[ChatMessageUser(content=content)], target=row["label"], id=row["id"]))
        for format_, images in {"eval": task == "pope", "json": False}.items():  # pictures in one log are enough
            eval(
                Task(dataset=MemoryDataset(samples, name=f"scenes_{task}"), solver=generate(), name=f"scenes_{task}"),
                model="embedded/testbed", log_dir=str(work / f"logs_inspect_{task}"), log_format=format_,
                display="none", log_images=images, log_realtime=False,
            )  # fmt: skip


def write_documented(work: Path) -> None:
    """Write our answers in the formats of tools that do not run here, by their documented fields."""
    import pandas

    for task in TASKS:
        lines = (work / f"ours_{task}" / "samples.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        table = pandas.DataFrame(
            {
                "index": [row["sample_id"] for row in rows],
                "question": [row["question"] for row in rows],
                "answer": [row["reference"].get("label", "") for row in rows],
                "prediction": [row["answer"]["text"] for row in rows],
            }
        )
        excel = pandas.ExcelWriter(
            work / f"vlmevalkit_{task}.xlsx",
            engine="xlsxwriter",
            engine_kwargs={"options": {"strings_to_formulas": False}},
        )
        with excel as writer:
            table.to_excel(writer, index=False)
        table.to_csv(work / f"vlmevalkit_{task}.tsv", sep="\t", index=False, quoting=csv.QUOTE_ALL)
        (work / f"vlmevalkit_{task}.json").write_text(json.dumps(table.to_dict("records"), indent=4))
        for name, convert in {
            "openai_requests": _request, "openai_batch": _batch_output, "llama_cpp": _completion,
        }.items():  # fmt: skip
            text = "".join(json.dumps(convert(row)) + "\n" for row in rows)
            (work / f"{name}_{task}.jsonl").write_text(text)


def _request(row: dict[str, Any]) -> dict[str, Any]:
    """Return a request of an OpenAI batch."""
    image = {"type": "image_url", "image_url": {"url": f"https://example.org/{row['image']}"}}
    content = [image, {"type": "text", "text": row["question"]}]
    body = {"model": "testbed", "messages": [{"role": "user", "content": content}], "logprobs": True}
    return {"custom_id": row["sample_id"], "method": "POST", "url": "/v1/chat/completions", "body": body}


def _batch_output(row: dict[str, Any]) -> dict[str, Any]:
    """Return a line of a batch's output, with the token ids that vLLM adds."""
    answer = row["answer"]
    tokens = [
        {"token": answer["text"][start:end], "logprob": value, "bytes": None, "top_logprobs": []}
        for (start, end), value in zip(answer["offsets"], answer["logprobs"], strict=True)
    ]
    choice = {
        "index": 0, "message": {"role": "assistant", "content": answer["text"]}, "logprobs": {"content": tokens},
        "finish_reason": "stop" if answer["finished"] else "length", "token_ids": answer["token_ids"],
    }  # fmt: skip
    body = {"id": "chatcmpl-1", "object": "chat.completion", "model": "testbed", "choices": [choice]}
    response = {"status_code": 200, "request_id": "req-1", "body": body}
    return {"id": "batch_req_1", "custom_id": row["sample_id"], "response": response, "error": None}


def _completion(row: dict[str, Any]) -> dict[str, Any]:
    """Return a response of llama.cpp's /completion beside the sample's id."""
    answer = row["answer"]
    probabilities = [
        {"id": id_, "token": "", "bytes": [], "logprob": value, "top_logprobs": []}
        for id_, value in zip(answer["token_ids"], answer["logprobs"], strict=True)
    ]
    response = {
        "index": 0, "content": answer["text"], "tokens": answer["token_ids"], "id_slot": 0, "stop": True,
        "model": "testbed.gguf", "prompt": row["prompt"], "truncated": False, "stopping_word": "",
        "stop_type": "eos" if answer["finished"] else "limit", "completion_probabilities": probabilities,
    }  # fmt: skip
    return {"id": row["sample_id"], "response": response}


# --- the logs that are kept -------------------------------------------------------------------------------------------


def collect(work: Path, target: Path) -> None:
    """Copy the logs and our own answers; of lmms-eval and lm-eval the folders as they are."""
    for task in TASKS:
        shutil.copy(work / f"ours_{task}" / "samples.jsonl", target / f"ours_{task}.jsonl")
        for kind in ("eval", "json"):
            newest = max((work / f"logs_inspect_{task}").glob(f"*.{kind}"))
            shutil.copy(newest, target / f"inspect_{task}.{kind}")
        for log in (*work.glob(f"vlm*_{task}.*"), *work.glob(f"openai*_{task}.*"), *work.glob(f"llama*_{task}.*")):
            shutil.copy(log, target)
    for tool in ("lm_eval", "lmms_eval"):
        for log in (work / f"logs_{tool}").rglob("*.json*"):
            copy = target / tool / log.name
            copy.parent.mkdir(exist_ok=True)
            if "results" in log.name:
                values = json.loads(log.read_text())
                config = {key: values["config"].get(key) for key in ("model", "model_args", "model_revision")}
                copy.write_text(
                    json.dumps({"config": config} | {key: values.get(key) for key in KEPT}, indent=1) + "\n"
                )
            else:
                shutil.copy(log, copy)


STEPS = {"documented": write_documented, "inspect": run_inspect, "lm_eval": run_lm_eval, "lmms_eval": run_lmms_eval}


def main() -> None:
    """Run the steps that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("steps", nargs="+")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    work = arguments.work.resolve()
    if arguments.steps[0] == "collect":
        collect(work, Path(arguments.steps[1]))
        return
    for step in arguments.steps:
        {"prepare": prepare, **STEPS}[step](work)


if __name__ == "__main__":
    main()
