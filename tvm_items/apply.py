"""Scheduling a model by its tuning database."""

from tvm_items.database import DatabaseError
from tvm_items.spaces import DesignSpaces
from tvm_items.tasks import default_schedule


def apply_database(module, target, database):
    """Returns a prepared Relax module, scheduled by the best records, and by TVM's default rules where there is none.

    database: read_database()'s. Raises DatabaseError where a record fits no task: it is not the database of this model
    as it is exported now.
    """
    import tvm
    from tvm import relax
    from tvm.s_tir.meta_schedule.database import ScheduleFnDatabase
    from tvm.s_tir.meta_schedule.utils import shash2hex

    records, used = {record["task"]: record for record in database["records"]}, set()

    def schedule_by_record(schedule):
        module = tvm.IRModule(schedule.mod.functions)  # without its name, which the hash would see
        record = records.get(shash2hex(module))
        if record is None:
            return False
        spaces = DesignSpaces(tvm.ir.save_json(module), str(target))
        if spaces.realize(record["space"], record["decisions"], schedule) is None:
            return False
        used.add(record["task"])
        return True

    with target, ScheduleFnDatabase(schedule_by_record), tvm.transform.PassContext(opt_level=3):
        module = relax.transform.MetaScheduleApplyDatabase()(module)
    if used != records.keys():
        unfit = f"{len(records) - len(used)} of {len(records)} records fit no kernel of the model"
        raise DatabaseError(f"{unfit} as it is exported here; delete the database to tune anew")
    return default_schedule(module, target)
