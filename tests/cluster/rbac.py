"""Who may do what: roles and bindings of the store, evaluated as the RBAC authorizer does."""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.cluster.schema import Json, Resource
from tests.cluster.store import Problem, Store

_RBAC = "rbac.authorization.k8s.io"
MASTERS = "system:masters"


@dataclass(frozen=True)
class User:
    """Somebody: a name and groups. Members of system:masters may do everything."""

    name: str
    groups: tuple[str, ...] = ("system:authenticated",)

    @classmethod
    def of(cls, name: str, groups: tuple[str, ...] = ()) -> "User":
        """The user of that name; service accounts are in their groups."""
        parts = name.split(":")
        more = (
            ("system:serviceaccounts", f"system:serviceaccounts:{parts[2]}")
            if name.startswith("system:serviceaccount:")
            else ()
        )
        return cls(name, (*groups, *more, "system:authenticated"))


@dataclass(frozen=True)
class Asked:
    """One thing that somebody wants: `resource` with its subresource ("pods/log")."""

    verb: str
    group: str
    resource: str
    namespace: str = ""
    name: str = ""


def _is(subject: Json, user: User, namespace: str) -> bool:
    kind, name = subject.get("kind"), subject.get("name")
    if kind == "ServiceAccount":
        return user.name == f"system:serviceaccount:{subject.get('namespace') or namespace}:{name}"
    return name == user.name if kind == "User" else kind == "Group" and name in user.groups


def rules(store: Store, user: User, namespace: str) -> Iterator[Json]:
    """All rules that hold for `user` in `namespace` ("": in the whole cluster)."""

    def objects(plural: str) -> dict[tuple[str, str], Json]:
        return store.collections[_RBAC, plural].objects

    with store.lock:
        for (where, _), binding in [*objects("clusterrolebindings").items(), *objects("rolebindings").items()]:
            if where not in {"", namespace}:
                continue
            if any(_is(subject, user, where) for subject in binding.get("subjects") or ()):
                role = binding["roleRef"]
                key = ("", role["name"]) if role["kind"] == "ClusterRole" else (where, role["name"])
                found = objects("clusterroles" if role["kind"] == "ClusterRole" else "roles").get(key)
                yield from (found or {}).get("rules") or ()


def allowed(store: Store, user: User, asked: Asked) -> bool:
    if MASTERS in user.groups:
        return True
    return any(_grants(rule, asked) for rule in rules(store, user, asked.namespace))


def _grants(rule: Json, asked: Asked) -> bool:
    subresource = asked.resource.partition("/")[2]
    names = rule.get("resourceNames") or ()
    resources = rule.get("resources") or ()
    return (
        bool({asked.verb, "*"} & set(rule.get("verbs") or ()))
        and bool({asked.group, "*"} & set(rule.get("apiGroups") or ()))
        and bool({asked.resource, "*", *((f"*/{subresource}",) if subresource else ())} & set(resources))
        and (not names or asked.name in names)
    )


def demand(store: Store, user: User, resource: Resource, asked: Asked) -> None:
    """Raise the 403 that the real server gives, where `asked` is not allowed."""
    if allowed(store, user, asked):
        return
    place = f'in the namespace "{asked.namespace}"' if asked.namespace else "at the cluster scope"
    about = f'{resource.qualified} "{asked.name}"' if asked.name else resource.qualified
    text = (
        f'{about} is forbidden: User "{user.name}" cannot {asked.verb} resource "{asked.resource}" '
        f'in API group "{asked.group}" {place}'
    )
    details: Json = {"name": asked.name} if asked.name else {}
    if asked.group:
        details["group"] = asked.group
    raise Problem(403, "Forbidden", text, {**details, "kind": resource.plural})
