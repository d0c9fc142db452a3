"""Everything that can go wrong, as one family of exceptions.

    SetupError              the service cannot start: one line for the operator
      InvalidSettings       a setting is unknown, of the wrong type or out of range
      InvalidModel          weights, labels and architecture do not go together, or an archive is
                            not as it was packaged

    RequestError            one request, or one image of it, is refused; its neighbours are answered
      400  MalformedRequest   the body is not what its form promises
      400  NoImage            nothing to classify
      400  UnreadableImage    damaged, truncated, or no image at all
      400  InvalidTopK
      400  InvalidBase64
      413  ImageTooLarge      more bytes than max_image_bytes
      413  TooManyPixels      more pixels than max_image_pixels, all images together
      413  TooManyImages      more images than max_images
      415  UnsupportedFormat  an image or document of a format outside the list
      500  ModelFailed        the log has the cause under the request id
      504  DeadlineExceeded   nobody waits for the answer any more
      507  OutOfResources     worker or GPU have no memory for the image, or the GPU failed

The class name is the `type` of the answer, so renaming one changes the API.
"""


class SetupError(Exception):
    """The service cannot start; the message is one line that says what to change."""


class InvalidSettings(SetupError):
    """A setting is unknown, of the wrong type or out of range."""


class InvalidModel(SetupError):
    """Weights, labels and architecture do not go together, or an archive is not as packaged."""


class RequestError(Exception):
    """A refused request. The message is sent to the client: no paths, addresses or tracebacks."""

    status = 400


class MalformedRequest(RequestError):
    """The body is not what its form promises: broken JSON or multipart, an unknown field."""


class NoImage(RequestError):
    """The request holds nothing to classify."""


class UnreadableImage(RequestError):
    """The bytes are damaged, truncated, or no image at all."""


class InvalidTopK(RequestError):
    """top_k is not a whole number from 1 to the number of classes."""


class InvalidBase64(RequestError):
    """A JSON image is not valid base64."""


class ImageTooLarge(RequestError):
    """The encoded image has more bytes than `max_image_bytes`."""

    status = 413


class TooManyPixels(RequestError):
    """The image's header announces more pixels than `max_image_pixels`."""

    status = 413


class TooManyImages(RequestError):
    """The request holds more images than `max_images`."""

    status = 413


class UnsupportedFormat(RequestError):
    """The bytes are of a recognised format that is not served."""

    status = 415


class ModelFailed(RequestError):
    """The model did not give a usable result; the log has the cause under the request id."""

    status = 500


class DeadlineExceeded(RequestError):
    """The time that the client, or the gateway, waits for an answer is over."""

    status = 504


class OutOfResources(RequestError):
    """Worker or GPU have no memory for the image, or the GPU failed and its worker is replaced."""

    status = 507
