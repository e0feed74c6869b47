"""An environment of several turns for the package verifiers: guess a word; it says whether to go on."""

import verifiers.v1 as vf

__all__ = ["Guess", "GuessEnv"]


class GuessData(vf.TaskData):
    answer: str
    trouble: str = ""


class GuessTask(vf.Task[GuessData]):
    @vf.reward
    async def found(self, trace) -> float:
        if self.data.trouble == "raise":
            raise ZeroDivisionError("of its own")
        return float(trace.last_reply.strip() == self.data.answer)


class GuessConfig(vf.TasksetConfig):
    size: int = 8
    trouble: str = ""


class Guess(vf.Taskset[GuessTask, GuessConfig]):
    def load(self):
        for i in range(self.config.size):
            word = "abcdef"[i % 6] * (1 + i // 6)
            yield GuessTask(GuessData(prompt=f"{word} ?", answer=word, trouble=self.config.trouble), self.config.task)


class GuessEnvConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()
    hint: str = "again"


class GuessEnv(vf.Env[GuessEnvConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as talk:
            said = await talk.turn()
            while not said.terminated and said.last_reply.strip() != task.data.answer:
                if task.data.trouble == "hang":
                    import asyncio

                    await asyncio.sleep(60)
                said = await talk.turn(self.config.hint)
