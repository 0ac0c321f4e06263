"""The stage ``learn-optimizer``: meta-train the general-purpose rule on small training tasks."""

from __future__ import annotations

import torch

from dynlm.changes import Changes, changing
from dynlm.files import Json
from dynlm.kept import Call, free, is_finished, mark
from dynlm.labs.general.train import GeneralMetaConfig, GeneralTrainer, meta_train_general
from dynlm.meta.train import MetaProgress
from dynlm.optim.base import Rule
from dynlm.optim.general import General
from dynlm.optim.sharing import save_rule
from dynlm.provenance import record
from dynlm.runs import Run
from dynlm.settings import as_json
from dynlm.tracking import tracking


def learn_optimizer(call: Call, config: GeneralMetaConfig) -> Json:
    """Writes the rule to the run's rules; every validation leaves a checkpoint to resume from."""
    run = Run(call.run)
    path, checkpoint = run.rule(General.name), run.checkpoint("learn-optimizer")
    free(path, call, checkpoint)
    kept = is_finished(path)
    torch.set_num_threads(1)  # such small networks lose by threads
    trainer = GeneralTrainer(General(seed=config.seed), config)
    if not call.resume and checkpoint.exists():
        with changing(run.path) as new:
            new.remove(checkpoint)

    def save(rule: Rule, progress: MetaProgress, new: Changes, finished: bool = False) -> None:
        mark(new, run, call)
        if finished or not kept:  # an earlier rule stays until this one is finished
            made = {"step": progress.step, "best_meta_validation": progress.best, "seconds": round(progress.seconds)}
            save_rule(rule, new.at(path), {**made, "settings": trainer.state()[1]["config"], "finished": finished})
            record(new, run, path)

    with tracking(call.log_with, "learn-optimizer", run.trackers, as_json(config)) as track:
        progress = meta_train_general(trainer, run, save, call.resume, track=track)
    with changing(run.path) as new:
        save(trainer.rule, progress, new, finished=True)
        new.remove(checkpoint)
    print(f"rule: {path} (lowest mean log(last / first held-out loss) {progress.best:.4f})")
    return {"rule": str(path), "meta_validation": progress.best, "steps": progress.step, "seconds": progress.seconds}
