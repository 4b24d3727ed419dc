"""Scheduling a model by its tuning database."""

from tvm_items.database import DatabaseError
from tvm_items.measure import schedule_candidate
from tvm_items.tasks import default_schedule


def apply_database(module, target, database):
    """Returns a prepared Relax module, scheduled by the best records, and by TVM's default rules where there is none.

    database: read_database()'s. Raises DatabaseError where a record fits no task: it is not the database of this model
    as it is exported now.
    """
    import tvm
    from tvm.s_tir.meta_schedule.utils import shash2hex

    as_task = tvm.get_global_func("tvm.s_tir.meta_schedule.normalize_mod")
    records, used = {record["task"]: record for record in database["records"]}, set()
    functions = dict(module.functions.items())
    for name, function in functions.items():
        if not isinstance(function, tvm.tirx.PrimFunc):
            continue
        task = as_task(function)
        record = records.get(shash2hex(task))
        if record is None:
            continue
        try:
            candidate = record["space"], record["decisions"]
            scheduled = schedule_candidate(tvm.ir.save_json(task), str(target), *candidate)["main"]
        except ValueError:  # it fits no task of this kind: said below
            continue
        used.add(record["task"])
        functions[name] = scheduled.without_attr("global_symbol").with_attr("tirx.is_scheduled", True)
    if used != records.keys():
        unfit = f"{len(records) - len(used)} of {len(records)} records fit no kernel of the model"
        raise DatabaseError(f"{unfit} as it is exported here; delete the database to tune anew")
    return default_schedule(tvm.IRModule(functions, attrs=module.attrs), target)
