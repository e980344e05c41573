"""Memory, traffic and time of a run before it is started, and the best layout's recipe (docs/planning.md)."""

from m2_ds.cli import run
from m2_ds.plan.command import plan

if __name__ == "__main__":
    run(plan, "plan_run")
