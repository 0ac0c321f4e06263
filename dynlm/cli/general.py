"""The stage ``learn-optimizer``: meta-train the general-purpose rule on small training tasks."""

from __future__ import annotations

import torch

from dynlm.cli.recipe import Recipe
from dynlm.cli.stages import free
from dynlm.meta.tasks import GeneralTrainer, meta_train_general
from dynlm.meta.train import MetaProgress
from dynlm.optim.base import Rule
from dynlm.optim.general import General
from dynlm.optim.library import save_rule
from dynlm.runs import Json, Run


def learn_optimizer(recipe: Recipe) -> Json:
    """Writes the rule to the run's rules; every validation leaves a checkpoint to resume from."""
    run, config = Run(recipe.run), recipe.general
    path, checkpoint = run.rule(General.name), run.checkpoint("learn-optimizer")
    if recipe.resume:
        run.require(checkpoint, "learn-optimizer")
    else:
        free(path, recipe, checkpoint)
        for stale in (checkpoint, run.log("learn-optimizer")):
            stale.unlink(missing_ok=True)
    torch.set_num_threads(1)  # such small networks lose by threads
    trainer = GeneralTrainer(General(seed=config.seed), config)

    def save(rule: Rule, progress: MetaProgress) -> None:
        made = {"step": progress.step, "best_meta_validation": progress.best, "seconds": round(progress.seconds)}
        save_rule(rule, path, {**made, "settings": trainer.state()[1]["config"]})

    progress = meta_train_general(trainer, run, save, recipe.resume)
    checkpoint.unlink(missing_ok=True)
    print(f"rule: {path} (lowest mean log(last / first held-out loss) {progress.best:.4f})")
    return {"rule": str(path), "meta_validation": progress.best, "steps": progress.step, "seconds": progress.seconds}
