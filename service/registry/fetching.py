"""`--weights` of another machine made into options that name files of this one."""

from dataclasses import dataclass, replace

from handler.errors import InvalidSettings
from service.options import Options
from service.registry.references import Url, parse_reference


@dataclass(frozen=True)
class Origin:
    """Where a weights file was fetched."""

    name: str  # a registered model as NAME/VERSION, else the file's name
    source: str  # the reference, with the version that an alias stood for; no query of a URL


def fetch(options: Options) -> tuple[Options, Origin | None]:
    """The options with fetched files in place of a reference, and where the weights are from.

    Options are unchanged, and there is no origin, if the weights are no reference. What a registry
    says about a model fills in the options that were not given. Raises SetupError.
    """
    reference = parse_reference(options.weights)
    if reference is None:
        return options, None
    if isinstance(reference, Url):
        from service.registry.downloads import download

        assert options.weights_sha256 is not None  # noqa: S101 - the options have seen to it
        path = download(reference, options.weights_sha256)
        return replace(options, weights=str(path)), Origin(path.name, reference.shown)
    from service.registry.models import find_model

    model = find_model(reference, options.weights_sha256)
    architecture = model.facts.get("architecture")
    if not options.models and not architecture:
        raise InvalidSettings(
            f"{model.source} does not say which architecture it is (tag `architecture`): give "
            "--model NAME"
        )
    models = options.models or (str(architecture),)
    # What is said about one architecture is of no use for another.
    facts = model.facts if models == (architecture,) else {}
    found = replace(
        options,
        models=models,
        weights=str(model.weights),
        labels=options.labels or (str(model.labels) if model.labels else None),
        recipe=options.recipe or facts.get("recipe"),
        transform_input=options.transform_input or facts.get("transform_input"),
    )
    return found, Origin(model.name, model.source)
