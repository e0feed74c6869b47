"""The program that plays a seat of a verifiers environment for the policy: a chat in this process, one model call a turn.

verifiers finds it by a module's name (host.py). Its own chat program is a script that every rollout would start in a process
of its own; what counts for an environment is that each call goes through the rollout's endpoint, and here it does.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import Any

import httpx
from mcp import MCPError
from verifiers.v1 import Harness, HarnessConfig, ModelContext, ProgramResult, Runtime, TaskData, Trace
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

__all__ = ["PolicyHarness"]


class PolicyHarnessConfig(HarnessConfig):
    pass


class PolicyHarness(Harness[PolicyHarnessConfig]):
    """Answers once, or again after each tool that it calls; a longer conversation comes back through `resume`."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
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
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            tools, *where = await connect_mcp({"mcpServers": servers}, stack)
            offered = {"tools": tools} if tools else {}
            # On this machine, over http: no certificates are read.
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=None, trust_env=False, verify=False))
            while True:
                reply = await client.post(
                    f"{endpoint}/chat/completions",
                    headers={"Authorization": f"Bearer {secret}"},
                    json={"model": ctx.model, "messages": messages, **offered},
                )
                body = reply.json() if reply.status_code == 200 else {}
                if "choices" not in body:
                    return ProgramResult(exit_code=1, stdout="", stderr=reply.text[:2000])
                said = body["choices"][0]["message"]
                messages.append(said)
                for call in said.get("tool_calls") or ():
                    result = await _called(call["function"], *where)
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
                if not said.get("tool_calls"):
                    return ProgramResult(exit_code=0, stdout="", stderr="")


async def _called(function: dict[str, Any], dispatch: dict[str, Any], servers: dict[str, Any]) -> Any:
    """What a call gave; one of a tool that is not there, or that refuses its arguments, gives a sentence."""
    if function["name"] not in dispatch:
        return f"there is no tool {function['name'][:100]!r}"
    try:
        return await call_mcp(servers, dispatch, function["name"], json.loads(function["arguments"]))
    except MCPError as e:
        return f"error: {e}"
