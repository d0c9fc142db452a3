-- POST /feedback: what was really in an image that the service has classified, and the counts that
-- come of it. Required only if GATEWAY_FEEDBACK_REQUESTS is not 0.
local cjson = require "cjson.safe"
local errors = require "errors"
local health = require "health"
local places = require "places"
local settings = require "settings"

local FIELDS = { request_id = true, class = true, class_id = true, image = true }

local JUDGED = "+" -- instead of a class
local UNKNOWN = "no answer of this id is remembered: another client or gateway had it, it is too old, or the "
    .. "request failed"

local feedback = {}

local answers = ngx.shared.feedback
local totals, by_class = ngx.shared.feedback_totals, ngx.shared.feedback_classes

-- A series as /metrics shows it, from pairs of a label and its value.
local function series(name, ...)
    local labels = {}
    for i = 1, select("#", ...), 2 do
        local label, value = select(i, ...)
        value = tostring(value):gsub("[\\\"\n]", { ["\\"] = [[\\]], ['"'] = [[\"]], ["\n"] = [[\n]] })
        labels[#labels + 1] = ('%s="%s"'):format(label, value)
    end
    return ("%s{%s}"):format(name, table.concat(labels, ","))
end

local function total(model, version, correct)
    return series("gateway_feedback_total", "model", model, "version", version, "correct", correct)
end

-- A new series that there is no room for is left out, so that none is forgotten.
local function count(counts, name)
    counts:safe_add(name, 0)
    counts:incr(name, 1)
end

-- What is remembered of an answer, by its request id: the client, the model, its version and the best
-- class of each image, "-" for one that was not classified.
local function keep(id, ...)
    answers:set(id, table.concat({ ... }, " "))
end

local function recall(id)
    return (answers:get(id) or ""):match "^(%S*) (%S+) (%S+) (%S+)$"
end

local started = {} -- versions whose totals are there

-- An answer goes to the client: remember the best class of each of its images. The one that was
-- not asked for longest is forgotten for it.
function feedback.remember(header)
    local model = ngx.var.target:match "^/predictions/([^/]+)"
    local version, ids = header["X-Model-Version"], header["X-Best-Classes"]
    if ngx.var.client == settings.jobs_client then -- nobody can judge it, and it would push out others
        return
    end
    if not ids or not version:find "^%w[%w_.-]*$" then -- of an archive from before there was feedback
        return
    end
    local target = model .. "/" .. version
    if not started[target] then -- at 0, so that rate() sees the first
        totals:safe_add(total(model, version, true), 0)
        totals:safe_add(total(model, version, false), 0)
        started[target] = true
    end
    keep(header["x-request-id"], ngx.var.client, model, version, ids)
end

local function refuse(status, message)
    ngx.status = status
    local text = errors.body(message)
    ngx.header["Content-Type"] = "application/json"
    ngx.header["Content-Length"] = #text
    return ngx.print(text)
end

local function is_index(value)
    return type(value) == "number" and value >= 0 and value % 1 == 0
end

-- What a body asks for, or nil and what is wrong with it.
local function read(body)
    local asked = cjson.decode(body)
    if type(asked) ~= "table" then
        return nil, 'the body must be JSON such as {"request_id": "...", "class": "tench"}'
    end
    for name in pairs(asked) do
        if not FIELDS[name] then
            return nil, "the fields are request_id, class or class_id, and image; there is another one"
        end
    end
    if type(asked.request_id) ~= "string" or #asked.request_id > 64
        or not asked.request_id:find "^[%w-]+$" then
        return nil, "request_id must be the X-Request-ID of an answer"
    elseif (asked.class == nil) == (asked.class_id == nil) then
        return nil, "either class or class_id must be given"
    elseif asked.class ~= nil and type(asked.class) ~= "string" then
        return nil, "class must be the name of a class, a text"
    elseif asked.class_id ~= nil and not is_index(asked.class_id) then
        return nil, "class_id must be the index of a class, a whole number from 0"
    elseif asked.image ~= nil and not is_index(asked.image) then
        return nil, "image must be the index of an image in its request, a whole number from 0"
    end
    return asked
end

-- The index of the class that is meant, or nil and what is wrong.
local function find_class(asked, labels)
    if asked.class_id then
        if labels[asked.class_id + 1] then
            return asked.class_id
        end
        return nil, ("class_id must be 0 to %d"):format(#labels - 1)
    end
    local found = {}
    for i, label in ipairs(labels) do
        if label == asked.class then
            found[#found + 1] = i - 1
        end
    end
    if #found > 1 then
        return nil, "several classes have this name; give class_id: " .. table.concat(found, " or ")
    end
    return found[1], "the model has no class of this name; GET /info says which model it is"
end

-- Mark an image of an answer as judged. Returns its best class; or nil, a status and what is wrong.
local function mark(asked)
    local client, model, version, ids = recall(asked.request_id)
    if not client then
        return nil, 404, UNKNOWN
    end
    local best = {}
    for id in ids:gmatch "[^,]+" do
        best[#best + 1] = id
    end
    local image = asked.image or #best == 1 and 0
    local id = image and best[image + 1]
    if not id then
        local message = "the request had %d images: image must be 0 to %d"
        return nil, 400, message:format(#best, #best - 1)
    elseif id == "-" then
        return nil, 400, "this image was not classified"
    elseif id == JUDGED then
        return nil, 409, "this answer has been judged already"
    end
    best[image + 1] = JUDGED
    keep(asked.request_id, client, model, version, table.concat(best, ","))
    return tonumber(id)
end

-- The same, and nobody else does so meanwhile: other workers of nginx have the same answers.
local function mark_alone(asked)
    local lock = asked.request_id .. " is judged"
    if not answers:add(lock, true, 1) then
        return nil, 409, "this answer is being judged"
    end
    local predicted, status, message = mark(asked)
    answers:delete(lock)
    return predicted, status, message
end

function feedback.judge()
    if not places.take() then
        return ngx.exit(429)
    end
    local asked, wrong = read(ngx.req.get_body_data() or "")
    if not asked then
        return refuse(400, wrong)
    end
    local client, model, version = recall(asked.request_id)
    if not client or client ~= ngx.var.client then -- who tries the ids of others learns nothing
        return refuse(404, UNKNOWN)
    end
    local _, text = health.labels(model .. "/" .. version)
    local labels = cjson.decode(text)
    if not labels then
        return refuse(503, ("no replica tells the classes of %s/%s now"):format(model, version))
    end
    local actual
    actual, wrong = find_class(asked, labels)
    if not actual then
        return refuse(400, wrong)
    end
    local predicted, status, message = mark_alone(asked)
    if not predicted then
        return refuse(status, message)
    end
    local label, correct = labels[actual + 1], actual == predicted
    count(totals, total(model, version, correct))
    count(by_class, series("gateway_feedback_class_total", "model", model, "version", version,
        "class_id", actual, "class", label, "correct", correct))
    health.send(200, cjson.encode {
        status = "success",
        model = model,
        version = version,
        predicted = { class = labels[predicted + 1], class_id = predicted },
        actual = { class = label, class_id = actual },
        correct = correct,
    })
end

local function print_counts(counts)
    for _, name in ipairs(counts:get_keys(0)) do
        ngx.print(("%s %d\n"):format(name, counts:get(name) or 0))
    end
end

function feedback.metrics()
    ngx.print "# HELP gateway_feedback_total Answers that clients have judged, by whether they were correct\n"
    ngx.print "# TYPE gateway_feedback_total counter\n"
    print_counts(totals)
    ngx.print "# HELP gateway_feedback_class_total The same by the true class\n"
    ngx.print "# TYPE gateway_feedback_class_total counter\n"
    print_counts(by_class)
end

return feedback
