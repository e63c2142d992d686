# SPDX-License-Identifier: Apache-2.0
"""A vLLM server that does not have this package serves what we write, and answers as transformers does.

Runs under `make test-vllm`, which makes vLLM's environment. vLLM's CPU kernels take 4 bits and multiply in bfloat16, or take
INT8, inputs and all; where two tokens are as likely as each other within that noise, either may be chosen: each chosen token
has to be the likeliest up to that.
"""

import json
import os
import pydoc_data.topics
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from hf_autoround import AutoRound, AutoRoundConfig

ENVIRONMENT = os.environ.get("VLLM_ENVIRONMENT")
pytestmark = pytest.mark.skipif(ENVIRONMENT is None, reason="make test-vllm runs this")

SERVED = {"W4A16G64": ("auto_round", "auto_gptq", "auto_awq", "llm_compressor"), "INT8": ("llm_compressor",)}
PROMPTS = ("The first time that", "In the", "It was one of the most important")
LENGTH = 16
# of a log-probability: 8 bits of mantissa through a few layers, measured 0.032 at most; where inputs are rounded too, that noise
# makes other codes of many, measured 0.092 at most
TOLERANCES = {"W4A16G64": 0.06, "INT8": 0.18}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A trained model where there is one, else a random one whose tokenizer knows pydoc's English."""
    if (SHARED / "models" / "qwen3-wiki").is_dir():
        return SHARED / "models" / "qwen3-wiki"
    folder = tmp_path_factory.mktemp("source")
    text = "\n".join(pydoc_data.topics.topics.values())
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    plain.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    config = Qwen3Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        vocab_size=512, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
        initializer_range=0.06,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(source, tmp_path_factory):
    """A folder of each scheme and format, the scheme's same numbers in each; some layers are left in 16 bits, whole fused
    units and single ones."""
    found = {}
    for scheme, formats in SERVED.items():
        folder = tmp_path_factory.mktemp(scheme) / "out"
        AutoRound(
            str(source), scheme=scheme, recipe="rtn", disable_tqdm=True,
            ignore_layers=["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.o_proj"],
        ).quantize_and_save(folder, ",".join(formats))  # fmt: skip
        found |= {(scheme, target): folder / target if len(formats) > 1 else folder for target in formats}
    return found


def environment():
    """The server's environment: vLLM's own, and nothing of this checkout in it."""
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "VLLM_ENVIRONMENT")}
    # on a CPU with AMX vLLM rounds the inputs of 4-bit layers to 8 bits, which is another model, unless told not to
    ours |= {"VLLM_CPU_INT4_W4A8": "0"}
    return ours | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def run_there(*arguments, folder):
    python = Path(ENVIRONMENT) / "bin" / "python"
    return subprocess.run([python, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)


@contextmanager
def serving(checkpoint, folder):
    """Run `vllm serve` until it is healthy; yield its address; end it and all its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [
        Path(ENVIRONMENT) / "bin" / "vllm", "serve", checkpoint, "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "quantized", "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256",
    ]  # fmt: skip
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while not healthy(port):
            assert server.poll() is None, f"vllm serve ended:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"vllm serve is not up after 300 s:\n{log.read_text()[-4000:]}"
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        for step in (signal.SIGTERM, signal.SIGKILL):  # the engine's processes outlive a server that was only terminated
            try:
                os.killpg(server.pid, step)
                server.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


def log_probabilities(model, ids):
    """Return the log-probability of every token but the first, and of the likeliest token in its place; (T - 1,) each."""
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], scores.max(-1).values


def test_the_server_does_not_have_this_package(tmp_path):
    found = run_there("-c", "import hf_autoround", folder=tmp_path)
    assert found.returncode != 0 and "No module named 'hf_autoround'" in found.stderr


@pytest.mark.parametrize(("scheme", "target"), [(scheme, target) for scheme, formats in SERVED.items() for target in formats])
def test_vllm_answers_as_transformers_does(scheme, target, source, checkpoints, tmp_path):
    checkpoint, tolerance = checkpoints[scheme, target], TOLERANCES[scheme]
    ours = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, quantization_config=AutoRoundConfig())
    exact = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with serving(checkpoint, tmp_path) as address:
        reply = run_there(Path(__file__).parent / "vllm" / "ask.py", address, "quantized", str(LENGTH), *PROMPTS, folder=tmp_path)
    assert reply.returncode == 0, reply.stderr
    noise, rounding = [], []
    for prompt, answer in zip(PROMPTS, json.loads(reply.stdout), strict=True):
        ids = answer["ids"]
        start = len(tokenizer(prompt)["input_ids"])
        assert ids[:start] == tokenizer(prompt)["input_ids"] and start < len(ids) <= start + LENGTH
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert text.rstrip("\ufffd") == answer["text"].rstrip("\ufffd")  # vLLM keeps back the bytes of a letter cut in two
        theirs = torch.tensor(answer["logprobs"][1:])
        expected, likeliest = log_probabilities(ours, ids)
        noise.append(theirs - expected)
        rounding.append(theirs - log_probabilities(exact, ids)[0])
        assert (likeliest - expected)[start - 1 :].max() < 2 * tolerance, "it is not the likeliest token that was chosen"
    noise, rounding = torch.cat(noise), torch.cat(rounding)
    found = f"{noise.std():.4f} (at most {noise.abs().max():.4f}) from transformers, {rounding.std():.4f} from float"
    print(f"{scheme} {target}: {found}")
    assert noise.abs().max() < tolerance
    if scheme == "INT8":  # nearer to the float model than to itself: the log says which one it is
        assert "CompressedTensorsW8A8Int8" in (tmp_path / "server.log").read_text()
    else:
        assert noise.std() < rounding.std() / 3, "as near to the float model: is this the quantized one?"
