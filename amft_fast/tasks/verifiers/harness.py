"""The program that plays a seat of a verifiers environment for the policy: a chat in this process, one model call a turn.

verifiers finds it by a module's name (host.py). Its own chat program is a script that every rollout would start in a process
of its own; what counts for an environment is that each call goes through the rollout's endpoint, and here it does.
"""

from __future__ import annotations

import httpx
from verifiers.v1 import Harness, HarnessConfig, ModelContext, ProgramResult, Runtime, TaskData, Trace
from verifiers.v1.dialects.chat import message_to_wire

__all__ = ["PolicyHarness"]


class PolicyHarnessConfig(HarnessConfig):
    pass


class PolicyHarness(Harness[PolicyHarnessConfig]):
    """Answers a conversation once; a longer one comes back through `resume` with all that was said."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: ModelContext,
        trace: Trace,
        runtime: Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: TaskData,
    ) -> ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        # On this machine, over http: no certificates are read.
        async with httpx.AsyncClient(timeout=None, trust_env=False, verify=False) as client:
            reply = await client.post(
                f"{endpoint}/chat/completions",
                headers={"Authorization": f"Bearer {secret}"},
                json={"model": ctx.model, "messages": messages},
            )
        return ProgramResult(exit_code=int(reply.status_code != 200), stdout="", stderr=reply.text[:2000])
