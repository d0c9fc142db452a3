-- A rollout under way (docs/rollout.md): which of two versions a request gets, what each of them answers,
-- and the shadow of a request, whose answer is compared and never sent.
local cjson = require "cjson.safe"
local settings = require "settings"

local MAX_SHADOWS = 4 -- at once, of this nginx worker: each holds a body
local SHADOW_SECONDS = 20 -- until one has failed
local MAX_ANSWER = 2 ^ 20 -- bytes, of one image
local FIRST_EDGE, PER_DOUBLING, BUCKETS = 0.001, 4, 64 -- of latencies: 1 ms to 65 s

local rollout = {}

local shared = ngx.shared.rollout
local known, text_known = nil, nil
local shadows = 0
local under_way = {} -- the version that a client's request was sent to, by the request's connection

function rollout.start_worker()
    math.randomseed(ngx.now() * 1000 + ngx.worker.pid()) -- workers are copies of one process
end

-- What ./scripts/rollout asks for, or nil.
local function current()
    local text = settings.rollout and shared:get "now"
    if text ~= text_known then
        known, text_known = text and cjson.decode(text), text
        if known then
            known.target = "/predictions/" .. known.model
        end
    end
    return known
end

-- Each step counts anew; a request counts for the step in which it came.
local function add(now, arm, what)
    shared:incr(("%d %s %s"):format(now.step, arm, what), 1, 0)
end

local function count(now, arm, what)
    return shared:get(("%d %s %s"):format(now.step, arm, what)) or 0
end

-- From service/gateway/rollout.py: the rollout as JSON, or "null".
function rollout.take()
    ngx.req.read_body()
    local text = ngx.req.get_body_data()
    local now = cjson.decode(text)
    if now == cjson.null then
        shared:delete "now"
    elseif type(now) == "table" then
        shared:set("now", text)
    else
        return ngx.exit(400)
    end
    for _, key in ipairs(shared:get_keys(0)) do
        local step = key:match "^(%d+) "
        if step and (now == cjson.null or tonumber(step) ~= now.step) then
            shared:delete(key)
        end
    end
    ngx.exit(204)
end

-- The path for a request to `target`, and its trial if the rollout chose that path: by request and
-- not by client, because one client may send everything.
function rollout.choose(target)
    local now = current()
    if not now or target ~= now.target then
        return target
    end
    local arm = math.random() * 100 < now.percent and "new" or "old"
    shared:incr("in flight " .. now[arm], 1, 0)
    under_way[ngx.var.connection] = now[arm]
    return target .. "/" .. now[arm], { now = now, arm = arm }
end

local function has_failed(status, by_handler)
    return status >= 500 or status == 404 and not by_handler -- the version is not there
end

local function note(now, arm, failed, seconds)
    add(now, arm, "requests")
    if failed then
        return add(now, arm, "errors")
    end
    local bucket = math.ceil(PER_DOUBLING * math.log(math.max(seconds, FIRST_EDGE) / FIRST_EDGE) / math.log(2))
    add(now, arm, "le " .. math.min(bucket, BUCKETS))
end

-- Counts an answer. Gives the path at which to ask again, or nil: what the new version fails, the old
-- one answers. `asked` is the client's own X-Request-Timeout, if it sent one.
function rollout.finish(trial, reply, asked)
    local now, arm = trial.now, trial.arm
    if reply.status == 504 and reply.by_handler and asked and asked ~= "" then
        return -- the client has given it too little time, which says nothing about the version
    end
    local failed = has_failed(reply.status, reply.by_handler)
    note(now, arm, failed, tonumber(reply.logged.seconds))
    add(now, arm, "live")
    if failed and arm == "new" then
        add(now, arm, "rescued")
        return now.target .. "/" .. now.old
    end
end

-- A request has ended, perhaps without an answer.
function rollout.leave(connection)
    local version = under_way[connection]
    if version then
        shared:incr("in flight " .. version, -1, 0)
        under_way[connection] = nil
    end
end

-- The best class of an answer about one image, or nil.
local function best_class(body)
    local answer = cjson.decode(body)
    local predictions = type(answer) == "table" and answer.predictions
    local best = type(predictions) == "table" and predictions[1]
    return type(best) == "table" and best.class or nil
end

-- The status and the body of an answer; TorchServe may leave the connection open behind it.
local function receive(socket)
    local line = socket:receive "*l"
    local status, length = line and tonumber(line:match "^HTTP/%S+ (%d+)"), 0
    while line and line ~= "" do
        length = tonumber(line:lower():match "^content%-length: *(%d+)") or length
        line = socket:receive "*l"
    end
    local body = line and length <= MAX_ANSWER and socket:receive(length)
    return body and status or 502, body
end

local function ask(address, request)
    local host, port = address:match "^(.+):(%d+)$"
    local socket = ngx.socket.tcp()
    socket:settimeout(SHADOW_SECONDS * 1000)
    local status, body = 502, nil
    if socket:connect(host, tonumber(port)) and socket:send(request) then
        status, body = receive(socket)
    end
    socket:close()
    return status, body
end

local function run_shadow(premature, now, address, request, expected)
    if not premature then
        local since = ngx.now()
        local status, body = ask(address, request)
        local failed = status >= 400 -- the old version has answered it
        note(now, "new", failed, ngx.now() - since)
        if not failed then
            add(now, "new", "compared")
            if best_class(body) ~= expected then
                add(now, "new", "disagreements")
            end
        end
    end
    shadows = shadows - 1
end

-- Perhaps asks the new version what the old one has answered a client, in the background.
function rollout.shadow(trial, reply, address)
    local now = trial.now
    local body = ngx.req.get_body_data()
    if trial.arm ~= "old" or reply.status ~= 200 or shadows >= MAX_SHADOWS or not body then
        return
    end
    local expected = math.random() * 100 < now.shadow and best_class(reply.body)
    if not expected then -- several images, or one of the open protocols
        return
    end
    local request = {
        "POST ", now.target, "/", now.new, " HTTP/1.1\r\n",
        "Host: torchserve\r\nConnection: close\r\nX-Probe: 1\r\n", -- no client's: neither counted nor logged
        "Content-Type: application/octet-stream\r\n",
        "X-Body-Type: ", ngx.var.body_type, "\r\n",
        "Content-Length: ", #body, "\r\n\r\n", body,
    }
    if ngx.timer.at(0, run_shadow, now, address, request, expected) then
        shadows = shadows + 1
    end
end

-- For /metrics: what each version of the rollout has done in its present step.
function rollout.print_metrics()
    if not settings.rollout then
        return
    end
    local now = current()
    ngx.print "# HELP gateway_rollout_step Step of the rollout under way, from 1; 0: there is none\n"
    ngx.print("# TYPE gateway_rollout_step gauge\ngateway_rollout_step ", now and now.step or 0, "\n")
    ngx.print "# HELP gateway_rollout_in_flight Requests of clients that a version has under way\n"
    ngx.print "# TYPE gateway_rollout_in_flight gauge\n"
    for _, key in ipairs(shared:get_keys(0)) do
        local version = key:match "^in flight (.+)"
        if version then
            ngx.print(('gateway_rollout_in_flight{version="%s"} %d\n'):format(version, shared:get(key)))
        end
    end
    for _, what in ipairs(now and { "requests", "live", "errors", "rescued", "compared", "disagreements" } or {}) do
        ngx.print(("# TYPE gateway_rollout_%s_total counter\n"):format(what))
        for _, arm in ipairs { "old", "new" } do
            ngx.print(('gateway_rollout_%s_total{version="%s"} %d\n'):format(what, now[arm], count(now, arm, what)))
        end
    end
    if now then
        ngx.print "# TYPE gateway_rollout_seconds histogram\n"
    end
    for _, arm in ipairs(now and { "old", "new" } or {}) do
        local sum = 0
        for bucket = 0, BUCKETS do
            local here = count(now, arm, "le " .. bucket)
            sum = sum + here
            if here > 0 then
                local edge = FIRST_EDGE * 2 ^ (bucket / PER_DOUBLING)
                ngx.print(('gateway_rollout_seconds_bucket{version="%s",le="%.6f"} %d\n'):format(now[arm], edge, sum))
            end
        end
        ngx.print(('gateway_rollout_seconds_bucket{version="%s",le="+Inf"} %d\n'):format(now[arm], sum))
    end
end

return rollout
