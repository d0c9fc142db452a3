-- /health, /info and /metrics: from the answers of several replicas.
local cjson = require "cjson.safe"
local errors = require "errors"
local places = require "places"
local replicas = require "replicas"
local rollout = require "rollout"
local settings = require "settings"
local state = require "state"

local MAKE_SECONDS = 10 -- after which another request tries to make the answer
local PIXEL = ngx.decode_base64( -- that of service/gateway/watch.py
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="
)

local health = {}

-- The status and the text that `make` gave a moment ago; 503 and "" if it failed. While one request makes a new one, the others get the
-- last, or wait. In memory, so that a full disk does not make a healthy service look unhealthy.
local function remembered(name, seconds, make)
    local answers = ngx.shared.answers
    local text, status = answers:get(name)
    while not text and not answers:add(name .. " is made", true, MAKE_SECONDS) do
        text, status = answers:get(name .. " before")
        if not text then
            ngx.sleep(0.02)
            text, status = answers:get(name)
        end
    end
    if not text then
        local made
        made, status, text = pcall(make)
        if not made then -- whatever a replica has said
            ngx.log(ngx.ERR, status)
            status, text = 503, ""
        end
        answers:set(name, text, status == 200 and seconds or 1, status)
        answers:set(name .. " before", text, 60, status)
        answers:delete(name .. " is made")
    end
    return status, text
end

function health.send(status, text)
    ngx.status = status
    ngx.header["Content-Type"] = "application/json"
    ngx.header["Content-Length"] = #text + 1
    ngx.print(text, "\n")
end

local function decoded(reply)
    local content = reply.status == 200 and cjson.decode(reply.body)
    return type(content) == "table" and type(content[1]) == "table" and content[1] or {}
end

local function has_ready_worker(facts)
    local workers = facts.workers
    for _, worker in ipairs(type(workers) == "table" and workers or {}) do
        if type(worker) == "table" and worker.status == "READY" then
            return true
        end
    end
    return false
end

local function is_ready(reply)
    return has_ready_worker(decoded(reply))
end

-- 200 if every model has a READY worker on some replica, and some replica answers predictions; else
-- 503 with what is missing.
local function make_health()
    local asked, known = {}, state.now()
    for _, address in ipairs(known.management) do
        for _, target in ipairs(settings.targets) do
            asked[#asked + 1] = { ("/_management/%s/%s"):format(address, target) }
        end
    end
    local replies = { ngx.location.capture_multi(asked) }
    local missing, whole, found = {}, 0, {}
    for replica = 1, #known.management do
        local all = true
        for i, target in ipairs(settings.targets) do
            local ready = is_ready(replies[(replica - 1) * #settings.targets + i])
            found[target] = found[target] or ready
            all = all and ready
        end
        whole = whole + (all and 1 or 0)
    end
    for _, target in ipairs(settings.targets) do
        if not found[target] then
            missing[#missing + 1] = target .. ": no replica has a READY worker"
        end
    end
    local silent = {}
    for _, replica in ipairs(known.upstreams) do
        local why = replicas.left_out(replica)
        silent[#silent + 1] = why and replica .. ": " .. why
    end
    local answering = #known.upstreams - #silent
    if answering == 0 then
        missing[#missing + 1] = "no replica answers a prediction"
    end
    return #missing > 0 and 503 or 200, cjson.encode {
        status = #missing > 0 and "unhealthy" or "healthy",
        model = settings.targets[1]:match "[^/]+",
        replicas = { ready = math.min(whole, answering), total = #known.management },
        missing = #missing > 0 and missing or nil,
        left_out = #silent > 0 and silent or nil,
    }
end

-- Whether some replica is not left out.
function health.answers_predictions()
    for _, replica in ipairs(state.now().upstreams) do
        if not replicas.left_out(replica) then
            return true
        end
    end
    return false
end

-- Whether the service is ready, as a status and a text.
function health.check()
    return remembered("health", 1, make_health)
end

function health.health()
    local status, text = health.check()
    health.send(status, text ~= "" and text or cjson.encode { status = "unhealthy" })
end

-- What is known of a model: its `versions`, in order, its `default`, and by version whether a replica
-- has a READY worker of it (`ready`). `versions` is nil if no replica says.
function health.versions(model)
    local _, text = remembered("versions " .. model, 1, function()
        local asked = {}
        for _, address in ipairs(state.now().management) do
            asked[#asked + 1] = { ("/_management/%s/%s"):format(address, model) }
            asked[#asked + 1] = { ("/_management/%s/%s/all"):format(address, model) }
        end
        local replies = { ngx.location.capture_multi(asked) }
        local ready, default = {}, nil
        for i, reply in ipairs(replies) do
            local content = reply.status == 200 and cjson.decode(reply.body)
            for _, facts in ipairs(type(content) == "table" and content or {}) do
                local version = type(facts) == "table" and facts.modelVersion
                if type(version) == "string" then
                    default = default or i % 2 == 1 and version or nil
                    ready[version] = ready[version] or has_ready_worker(facts)
                end
            end
        end
        local versions = {}
        for version in pairs(ready) do
            versions[#versions + 1] = version
        end
        table.sort(versions)
        return 200, cjson.encode {
            versions = #versions > 0 and versions or nil,
            default = default,
            ready = ready,
        }
    end)
    return cjson.decode(text) or {}
end

-- The handler's own description of a model, verbatim, from the first replica that gives one. One that
-- still loads is not asked: it would answer when it has, or never. `target` is MODEL or MODEL/VERSION.
function health.describe(target)
    return remembered("info " .. target, 10, function()
        local asked, management = {}, state.now().management
        for _, address in ipairs(management) do
            asked[#asked + 1] = { ("/_management/%s/%s"):format(address, target) }
        end
        for i, answer in ipairs { ngx.location.capture_multi(asked) } do
            local reply = { status = 503 }
            if is_ready(answer) then
                reply = ngx.location.capture(("/_describe/%s/%s"):format(management[i], target))
            end
            local text = reply.status == 200 and reply.body:match '"customizedMetadata":%s*(%b{})'
            local facts = text and cjson.decode(text)
            if facts and facts.model then
                return 200, text
            end
        end
        return 503, ""
    end)
end

-- The names of a model's classes by their index, as JSON. Nothing gives them but a prediction of so many
-- classes: that of one grey pixel, which the handler counts as a health check. `target` is MODEL/VERSION.
function health.labels(target)
    return remembered("labels " .. target, 60, function()
        local _, text = health.describe(target)
        local facts = cjson.decode(text) or {}
        for _, replica in ipairs(state.now().upstreams) do
            local reply = {}
            if facts.classes and not replicas.left_out(replica) then
                reply = ngx.location.capture(("/_labels/%s/predictions/%s"):format(replica, target), {
                    method = ngx.HTTP_POST,
                    args = { top_k = facts.classes },
                    body = PIXEL,
                })
            end
            local answer = reply.status == 200 and cjson.decode(reply.body)
            if answer then
                local labels = {}
                for _, prediction in ipairs(answer.predictions) do
                    labels[prediction.class_id + 1] = prediction.class
                end
                return 200, cjson.encode(labels)
            end
        end
        return 503, ""
    end)
end

function health.info()
    if not places.take() then
        return ngx.exit(429)
    end
    local target = ngx.var.described
    local status, text = health.describe(target)
    ngx.status = status
    health.send(status, status == 200 and text or errors.body("no replica describes " .. target))
end

function health.metrics()
    ngx.header["Content-Type"] = "text/plain"
    ngx.print "# HELP gateway_connections Connections of clients by state\n# TYPE gateway_connections gauge\n"
    for _, state in ipairs { "reading", "writing", "waiting" } do
        local connections = ngx.var["connections_" .. state]
        ngx.print(('gateway_connections{state="%s"} %s\n'):format(state, connections))
    end
    ngx.print "# HELP gateway_replica_in_use Whether a replica answers, so that it gets requests\n"
    ngx.print "# TYPE gateway_replica_in_use gauge\n"
    for _, replica in ipairs(state.now().upstreams) do
        local in_use = replicas.left_out(replica) and 0 or 1
        ngx.print(('gateway_replica_in_use{replica="%s"} %d\n'):format(replica, in_use))
    end
    if settings.jobs then
        ngx.print "# HELP gateway_jobs_up Whether jobs can be reached: their process, and its Redis\n"
        ngx.print "# TYPE gateway_jobs_up gauge\n"
        local reply = ngx.location.capture "/_jobs"
        ngx.print(("gateway_jobs_up %d\n"):format(reply.status == 404 and 1 or 0))
    end
    rollout.print_metrics()
end

return health
