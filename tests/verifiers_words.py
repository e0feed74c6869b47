"""An environment of one turn for the package verifiers: say the word again."""

import verifiers.v1 as vf

__all__ = ["Words"]


class WordData(vf.TaskData):
    answer: str


class WordTask(vf.Task[WordData]):
    @vf.reward(weight=2.0)
    async def exact(self, trace) -> float:
        return float(trace.last_reply.strip() == self.data.answer)

    @vf.reward(weight=0.5)
    async def short(self, trace) -> float:
        return float(len(trace.last_reply) < 5)

    @vf.metric
    async def letters(self, trace) -> float:
        return float(len(trace.last_reply))


class WordsConfig(vf.TasksetConfig):
    words: list[str] = ["a", "b", "c", "d", "e", "f", "yes", "no"]  # noqa: RUF012 - pydantic copies it
    lead: str = ""


class Words(vf.Taskset[WordTask, WordsConfig]):
    def load(self):
        system = self.config.lead or None
        for word in self.config.words:
            yield WordTask(WordData(prompt=word, answer=word, system_prompt=system), self.config.task)
