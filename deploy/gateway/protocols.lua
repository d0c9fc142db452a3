-- What KServe's V1 protocol and the Open Inference Protocol (V2) ask besides predictions. Their sources are
-- kserve.github.io/website (V1) and kserve/kserve:docs/predict-api/v2/required_api.md (V2).
local cjson = require "cjson.safe"
local errors = require "errors"
local health = require "health"
local places = require "places"
local settings = require "settings"

local NAME, VERSION = "image-classification-torchserve", "0.1.0" -- as in pyproject.toml
local NOT_READY = 400 -- V2: "a 4xx status code indicates false"

local protocols = {}

local function is_served(model)
    for _, name in ipairs(settings.models) do
        if name == model then
            return true
        end
    end
    return false
end

-- Whether a version of a model can answer a prediction now, its default version for "". nil if there is
-- no such model or version.
local function is_ready(model, version)
    if not is_served(model) then
        return nil
    end
    local known = health.versions(model)
    if not known.versions then -- nobody says: they may be restarting
        return false
    end
    if version == "" then
        return known.ready[known.default or ""] == true and health.answers_predictions()
    end
    local ready = known.ready[version]
    return ready and health.answers_predictions()
end

function protocols.answer_v1(model)
    if model == "" then
        return health.send(200, cjson.encode { models = settings.models })
    end
    local ready = is_ready(model, "")
    if ready == nil then
        return ngx.exit(404)
    end
    -- V1 names no status for "not ready": KServe's own is 503, which a probe understands.
    health.send(ready and 200 or 503, cjson.encode { name = model, ready = ready })
end

function protocols.describe_server()
    health.send(200, cjson.encode {
        name = NAME,
        version = VERSION,
        extensions = { "binary_tensor_data", "classification" },
    })
end

-- "live" is whether requests are received and answered at all: nginx does, or nobody reads this.
function protocols.answer_health(question)
    local well = question == "live" or health.check() == 200
    health.send(well and 200 or NOT_READY, cjson.encode { [question] = well })
end

function protocols.answer_ready(model, version)
    local ready = is_ready(model, version)
    if ready == nil then
        return ngx.exit(404)
    end
    health.send(ready and 200 or NOT_READY, cjson.encode { name = model, ready = ready })
end

-- Names, datatypes and shapes of what /infer takes and gives. Each version has its own number of classes.
function protocols.describe_model(model, version)
    if not is_served(model) then
        return ngx.exit(404)
    end
    if not places.take() then
        return ngx.exit(429)
    end
    local known = health.versions(model)
    if known.versions and version ~= "" and known.ready[version] == nil then
        return ngx.exit(404)
    end
    local target = version == "" and model or model .. "/" .. version
    local facts
    if known.versions then -- else a version that a client has made up would be asked for
        local _, text = health.describe(target)
        facts = cjson.decode(text)
    end
    if not facts then
        ngx.status = 503
        return health.send(503, errors.body("no replica describes " .. target))
    end
    local function tensor(name, datatype, ...)
        return { name = name, datatype = datatype, shape = { ... } }
    end
    local properties = {} -- strings, as the protocol has them
    for _, of in ipairs { "certificate", "confidence" } do
        -- Else null: an archive without golden images, or one that was not calibrated.
        for name, value in pairs(type(facts[of]) == "table" and facts[of] or {}) do
            properties[of .. "." .. name] = tostring(value)
        end
    end
    health.send(200, cjson.encode {
        name = model,
        versions = known.versions,
        properties = next(properties) and properties or nil,
        platform = "pytorch_torchserve",
        inputs = { tensor("image", "BYTES", -1) },
        outputs = {
            tensor("label", "BYTES", -1, -1),
            tensor("class_id", "INT64", -1, -1),
            tensor("confidence", "FP32", -1, -1),
            tensor("probabilities", "FP32", -1, facts.classes),
        },
    })
end

return protocols
