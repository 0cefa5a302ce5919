"""Score an artifact and its dense model on tasks of lm-evaluation-harness.

python examples/evaluate_lm_eval.py artifacts/opt-books-15m-plainact-s50-cpu piqa_file examples

The last argument is a folder with tasks of your own, such as examples/piqa_file.yaml; without it
the harness's own are known, whose data it fetches from the hub.
"""

import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from shadowc.evaluation.lm_eval import ShadowLM


def main(artifact: str, tasks: str, folder: str | None = None) -> None:
    """Print each task's metrics, the artifact's and those of dense."""
    manager = TaskManager(include_path=folder)
    for name, dense in (("artifact", False), ("dense", True)):
        model = ShadowLM.create_from_arg_obj({"artifact": artifact, "dense": dense})
        found = simple_evaluate(model, tasks=tasks.split(","), task_manager=manager)
        for task, metrics in found["results"].items():
            numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
            print(task, name, *(f"{key}={value:.4f}" for key, value in numbers.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
