# SPDX-License-Identifier: Apache-2.0
"""Asks a server to go on with prompts, as any user of the `openai` client does; runs with the Python of vLLM's environment,
which brings the client along.

    python ask.py http://127.0.0.1:8000/v1 model 16 "prompt" ...

prints, for each prompt, the text it is answered with, and (token id, log-probability) of every token of both.
"""

import json
import sys

from openai import OpenAI

address, model, length, *prompts = sys.argv[1:]
client = OpenAI(base_url=address, api_key="none")
answers = []
for prompt in prompts:
    plain = client.completions.create(model=model, prompt=prompt, max_tokens=int(length), temperature=0)
    scored = client.completions.create(
        model=model, prompt=prompt, max_tokens=int(length), temperature=0, logprobs=0, echo=True,
        extra_body={"return_tokens_as_token_ids": True},
    ).choices[0].logprobs  # fmt: skip
    ids = [int(token.removeprefix("token_id:")) for token in scored.tokens]
    answers.append({"text": plain.choices[0].text, "ids": ids, "logprobs": scored.token_logprobs})
json.dump(answers, sys.stdout)
