"""An environment with a tool for the package verifiers: look a number up."""

import verifiers.v1 as vf

__all__ = ["LookUp"]


class LookUpConfig(vf.TasksetConfig):
    tools: vf.SharedToolsetConfig = vf.SharedToolsetConfig()


class Book(vf.Toolset[vf.SharedToolsetConfig]):
    """Runs in a process of its own."""

    TOOL_PREFIX = "book"

    @vf.tool
    async def number(self, name: str) -> str:
        """The number of a name."""
        return {"ann": "12", "bob": "34"}[name]


class NumberData(vf.TaskData):
    answer: str


class NumberTask(vf.Task[NumberData]):
    @vf.reward
    async def exact(self, trace) -> float:
        return float(trace.last_reply.strip() == self.data.answer)


class LookUp(vf.Taskset[NumberTask, LookUpConfig]):
    def load(self):
        for name, number in (("ann", "12"), ("bob", "34"), ("ann and bob", "46"), ("bob and ann", "46")):
            yield NumberTask(NumberData(prompt=f"The number of {name}?", answer=number), self.config.task)

    @classmethod
    def toolsets(cls, config):
        return [Book(config.tools)]


if __name__ == "__main__":
    Book.run()
