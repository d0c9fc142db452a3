-- What nginx's own directives cannot express: keys by their hash, bodies with a limit in time, a second
-- try at another replica, health and info from the answers of several replicas, and the errors of
-- TorchServe in the form of the handler's.
local cjson = require "cjson.safe"
local ffi = require "ffi"
local semaphore = require "ngx.semaphore"

local capture = ngx.location.capture
local GRACE_SECONDS = 2 -- a body that takes longer may be given up to make room for another
local UNFAIR = 4 -- times as many arriving bytes as another client has
local LEAST_BYTES = 65536 -- that each connection counts for
local ANSWERED_SECONDS = 10 -- for so long an answer proves that a replica is alive
local MAKE_SECONDS = 10 -- after which another request tries to make the answer

-- OpenSSL's own, which nginx is linked with.
ffi.cdef [[
    unsigned char *SHA256(const unsigned char *data, size_t size, unsigned char *digest);
    int kill(int process, int signal);
]]
local digest = ffi.new "unsigned char[32]"

local gateway = {}
local settings -- from nginx.conf

function gateway.setup(values)
    settings = values
end

-- --- requests

-- The sha256 of the client's API key, in hex; "" without a key. Looking it up in a hash table tells
-- a client nothing by how long it takes: that depends on the digest, and whoever could choose
-- digests at will would have broken sha256.
function gateway.key_hash()
    local key = (ngx.var.http_authorization or ""):match "^[Bb][Ee][Aa][Rr][Ee][Rr] +(%S+)$"
    key = key or ngx.var.http_x_api_key
    if not key or key == "" then
        return ""
    end
    ffi.C.SHA256(key, #key, digest)
    return (ffi.string(digest, 32):gsub(".", function(byte)
        return ("%02x"):format(byte:byte())
    end))
end

-- Requests of this nginx worker whose bodies are still on their way, by their ids, and the memory
-- that they may take.
local arriving = {}
local arriving_bytes = 0

-- The body of a request has arrived, or never will. Returns its entry, if it has one.
local function forget(id)
    local entry = arriving[id]
    if entry then
        arriving[id] = nil
        arriving_bytes = arriving_bytes - entry.bytes
    end
    return entry
end

-- The arriving bytes of each client, the client with most, and the id of its oldest request.
local function heaviest()
    local bytes, oldest, most = {}, {}, nil
    for id, entry in pairs(arriving) do
        local client = entry.client
        bytes[client] = (bytes[client] or 0) + entry.bytes
        if not oldest[client] or entry.since < arriving[oldest[client]].since then
            oldest[client] = id
        end
        if not most or bytes[client] > bytes[most] then
            most = client
        end
    end
    return bytes, most, oldest[most]
end

-- Give up bodies that are slow, or whose client has far more arriving than this one, until there is
-- room, so that no client locks the others out. False if there is no room.
local function make_room(client, needed)
    while arriving_bytes + needed > settings.arriving_bytes and next(arriving) do
        local bytes, most, oldest = heaviest()
        local slow = ngx.now() - arriving[oldest].since >= GRACE_SECONDS
        if not slow and bytes[most] < UNFAIR * ((bytes[client] or 0) + needed) then
            return false
        end
        forget(oldest).leave:post(1)
    end
    return true
end

-- Take in the whole body, before the request counts as one that is under way.
function gateway.receive()
    local client = ngx.var.client_id
    local length = tonumber(ngx.var.http_content_length)
    if ngx.var.http_transfer_encoding then
        length = settings.max_body_bytes -- unknown before it has arrived
    end
    local bytes = math.max(length or 0, LEAST_BYTES)
    if not make_room(client, bytes) then
        return ngx.exit(429)
    end
    local id = ngx.var.request_id
    local entry = { client = client, bytes = bytes, since = ngx.now(), leave = semaphore.new() }
    arriving[id] = entry
    arriving_bytes = arriving_bytes + bytes
    local watch = ngx.thread.spawn(function()
        entry.leave:wait(settings.body_seconds) -- until it is posted, or time is up
        if not entry.is_refused then
            return ngx.exit(408)
        end
    end)
    ngx.req.read_body()
    ngx.thread.kill(watch)
    forget(id)
    return ngx.exec "@predict"
end

-- Gives nginx's refusal of a request, perhaps while its body was arriving, the form of the handler's
-- errors. In a filter and not by error_page, which would take the request away from its own threads.
function gateway.refuse()
    local entry = forget(ngx.var.request_id)
    if entry then
        entry.is_refused = true
    end
    ngx.ctx.refusal = cjson.encode {
        status = "error",
        code = ngx.status,
        type = ngx.var.error_type,
        message = ngx.var.error_message,
    }
    ngx.header["Content-Type"] = "application/json"
    ngx.header["Content-Length"] = #ngx.ctx.refusal
end

function gateway.print_refusal()
    ngx.arg[1] = ngx.ctx.refusal or ""
    ngx.ctx.refusal = nil -- the page may be sent in several pieces
end

-- --- places: how many requests are under way

local places, workers = ngx.shared.places, ngx.shared.workers
local own = "" -- this worker's process id, a part of its keys
local living, looked = {}, 0 -- nginx's workers, and when that was
local placed = {} -- the client whose place a request has, by the request's id

-- Places are counted by worker, so that those of a killed worker go with it.
function gateway.start_worker()
    own = tostring(ngx.worker.pid())
    for _, key in ipairs(places:get_keys(0)) do
        if key:find(own .. " ", 1, true) == 1 then -- of an earlier process with this number
            places:delete(key)
        end
    end
    workers:set(own, true)
end

local function taken(name)
    if ngx.now() - looked >= 1 then
        living, looked = {}, ngx.now()
        for _, worker in ipairs(workers:get_keys(0)) do
            if ffi.C.kill(tonumber(worker), 0) == 0 then
                living[#living + 1] = worker
            else
                workers:delete(worker)
            end
        end
    end
    local sum = 0
    for _, worker in ipairs(living) do
        sum = sum + (places:get(worker .. " " .. name) or 0)
    end
    return sum
end

local function change(name, by)
    local key = own .. " " .. name
    if places:incr(key, by, 0) == 0 then
        places:delete(key)
    end
end

-- Take a place for the request until it ends; false if there is none.
local function take_place()
    local client = ngx.var.client_id
    if taken "all" >= settings.max_concurrent or taken(client) >= settings.max_concurrent_per_client then
        return false
    end
    change("all", 1)
    change(client, 1)
    placed[ngx.var.request_id] = client
    return true
end

-- --- predictions

-- Requests that this nginx worker has under way at each replica, and the turn among equal replicas.
local under_way = {}
local asked = {} -- the replica that has a request, by the request's id
local turn = 0

-- Why a replica gets no requests, or nil. One that answers clients gets them, even if the check of
-- service/gateway/watch.py failed (the queue may be long), unless it is silent altogether.
local function left_out(replica)
    local why, is_silent = ngx.shared.left_out:get(replica.address)
    if why and is_silent ~= 1 and ngx.shared.answered:get(replica.address) then
        return nil
    end
    return why
end

-- The replica with the fewest requests under way, if possible one that answers and was not tried.
local function choose(tried)
    local best, least
    for i = 1, #settings.replicas do
        local replica = settings.replicas[(turn + i) % #settings.replicas + 1]
        local load = under_way[replica.name] or 0
        if left_out(replica) then
            load = load + 1e6
        end
        if replica == tried then
            load = load + 1e9
        end
        if not best or load < least then
            best, least = replica, load
        end
    end
    return best
end

local function append(name, value)
    local before = ngx.var[name]
    ngx.var[name] = before == "" and value or before .. " : " .. value
end

local function count(replica, change)
    under_way[replica.name] = (under_way[replica.name] or 0) + change
end

local function ask(location, replica)
    local id = ngx.var.request_id
    count(replica, 1)
    asked[id] = replica
    local seen = {}
    local reply = capture(location .. replica.name .. ngx.var.target, {
        method = ngx.HTTP_POST,
        args = ngx.var.args,
        always_forward_body = true,
        ctx = seen,
    })
    count(replica, -1)
    asked[id] = nil
    if reply.truncated and reply.status < 500 then -- its connection broke off
        reply = { status = 502, header = {}, body = "" }
    end
    reply.by_handler = reply.header["X-Model-Version"] ~= nil
    if reply.by_handler and reply.status < 500 then
        ngx.shared.answered:set(replica.address, true, ANSWERED_SECONDS)
    end
    append("tried_addresses", replica.address)
    append("tried_statuses", seen.status or "")
    append("tried_seconds", seen.seconds or "")
    return reply
end

-- In the subrequest: keep for the request itself what nginx knows of the upstream.
function gateway.note()
    ngx.ctx.status = ngx.var.upstream_status
    ngx.ctx.seconds = ngx.var.upstream_header_time
end

-- A request has ended, perhaps before its body or its answer was complete.
function gateway.leave()
    local id = ngx.var.request_id
    forget(id)
    if asked[id] then
        count(asked[id], -1)
        asked[id] = nil
    end
    if placed[id] then
        change("all", -1)
        change(placed[id], -1)
        placed[id] = nil
    end
end

-- Another replica than one that was chosen, or nil: one that is left out is no better.
local function another_than(replica)
    local other = choose(replica)
    if other ~= replica and (not left_out(other) or left_out(replica)) then
        return other
    end
end

-- Where to try a request again, or nil: predictions change nothing, so that they may be. An error
-- that the handler gives would come again, unless it is the GPU's; a worker that died (500, and 507
-- after kill -9) has neighbours even in a replica that is alone.
local function try_again_at(reply, tried)
    if reply.status == 507 or reply.status == 500 and not reply.by_handler then
        return another_than(tried) or tried
    elseif reply.status >= 502 and reply.status <= 504 then
        return another_than(tried)
    end
end

-- TorchServe's own status as a client of the gateway should see it.
local SEEN_AS = { [502] = 503, [507] = 500 }

function gateway.predict()
    if not take_place() then
        return ngx.exit(429)
    end
    turn = turn + 1
    local replica = choose()
    local reply = ask(another_than(replica) and "/_first/" or "/_second/", replica)
    local other = try_again_at(reply, replica)
    if other then
        reply = ask("/_second/", other)
    end
    ngx.var.torchserve_id = reply.header["x-request-id"] or ""
    ngx.var.version_answered = reply.header["X-Model-Version"] or ""
    if reply.status >= 400 and not reply.by_handler then
        ngx.status = SEEN_AS[reply.status] or reply.status
        ngx.header["Content-Type"] = "application/json"
        -- TorchServe's message, if it tells the client something.
        local content = reply.status < 500 and cjson.decode(reply.body)
        local theirs = type(content) == "table" and content.message
        return ngx.print(cjson.encode {
            status = "error",
            code = ngx.status,
            type = ngx.var.error_type,
            message = theirs or ngx.var.error_message,
        })
    end
    ngx.status = reply.status
    ngx.header["Content-Type"] = reply.header["Content-Type"]
    ngx.header["X-Model-Version"] = reply.header["X-Model-Version"]
    ngx.header["Content-Length"] = #reply.body
    ngx.print(reply.body)
end

-- --- health and info

-- Send the answer that `make` gave a moment ago. While one request makes a new one, the others get the
-- last, or wait. In memory, so that a full disk does not make a healthy service look unhealthy.
local function answer(name, seconds, make)
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
            status, text = 503, cjson.encode { status = "unhealthy" }
        end
        answers:set(name, text, status == 200 and seconds or 1, status)
        answers:set(name .. " before", text, 60, status)
        answers:delete(name .. " is made")
    end
    ngx.status = status
    ngx.header["Content-Type"] = "application/json"
    ngx.print(text, "\n")
end

local function decoded(reply)
    local content = reply.status == 200 and cjson.decode(reply.body)
    return type(content) == "table" and type(content[1]) == "table" and content[1] or {}
end

local function is_ready(reply)
    local workers = decoded(reply).workers
    for _, worker in ipairs(type(workers) == "table" and workers or {}) do
        if type(worker) == "table" and worker.status == "READY" then
            return true
        end
    end
    return false
end

-- 200 if every model has a READY worker on some replica, and some replica answers predictions; else
-- 503 with what is missing.
local function make_health()
    local asked = {}
    for replica = 0, settings.management - 1 do
        for _, target in ipairs(settings.targets) do
            asked[#asked + 1] = { ("/_management/%d/%s"):format(replica, target) }
        end
    end
    local replies = { ngx.location.capture_multi(asked) }
    local missing, whole, found = {}, 0, {}
    for replica = 0, settings.management - 1 do
        local all = true
        for i, target in ipairs(settings.targets) do
            local ready = is_ready(replies[replica * #settings.targets + i])
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
    for _, replica in ipairs(settings.replicas) do
        local why = left_out(replica)
        silent[#silent + 1] = why and replica.address .. ": " .. why
    end
    local answering = #settings.replicas - #silent
    if answering == 0 then
        missing[#missing + 1] = "no replica answers a prediction"
    end
    return #missing > 0 and 503 or 200, cjson.encode {
        status = #missing > 0 and "unhealthy" or "healthy",
        model = settings.targets[1]:match "[^/]+",
        replicas = { ready = math.min(whole, answering), total = settings.management },
        missing = #missing > 0 and missing or nil,
        left_out = #silent > 0 and silent or nil,
    }
end

function gateway.health()
    answer("health", 1, make_health)
end

-- The handler's own description of the model, verbatim, from the first replica that gives one.
function gateway.info()
    if not take_place() then
        return ngx.exit(429)
    end
    local target = ngx.var.described
    answer("info " .. target, 10, function()
        for replica = 0, settings.management - 1 do
            local reply = capture(("/_describe/%d/%s"):format(replica, target))
            local text = reply.status == 200 and reply.body:match '"customizedMetadata":%s*(%b{})'
            local facts = text and cjson.decode(text)
            if facts and facts.model then
                return 200, text
            end
        end
        return 503, cjson.encode {
            status = "error",
            code = 503,
            type = "Unavailable",
            message = "no replica describes " .. target,
        }
    end)
end

function gateway.metrics()
    ngx.header["Content-Type"] = "text/plain"
    ngx.print "# HELP gateway_connections Connections of clients by state\n# TYPE gateway_connections gauge\n"
    for _, state in ipairs { "reading", "writing", "waiting" } do
        local connections = ngx.var["connections_" .. state]
        ngx.print(('gateway_connections{state="%s"} %s\n'):format(state, connections))
    end
    ngx.print "# HELP gateway_replica_in_use Whether a replica answers, so that it gets requests\n"
    ngx.print "# TYPE gateway_replica_in_use gauge\n"
    for _, replica in ipairs(settings.replicas) do
        local in_use = left_out(replica) and 0 or 1
        ngx.print(('gateway_replica_in_use{replica="%s"} %d\n'):format(replica.address, in_use))
    end
end

-- What service/gateway/watch.py has found: as JSON, by address, `why` a replica gets no requests,
-- and whether it `is_silent`.
function gateway.take_left_out()
    ngx.req.read_body()
    local found = cjson.decode(ngx.req.get_body_data())
    if type(found) ~= "table" then
        return ngx.exit(400)
    end
    local left_out = ngx.shared.left_out
    for _, address in ipairs(left_out:get_keys(0)) do -- those of an earlier configuration, too
        if not found[address] then
            left_out:delete(address)
        end
    end
    for address, state in pairs(found) do
        left_out:set(address, state.why, 0, state.is_silent and 1 or 0)
    end
    ngx.exit(204)
end

return gateway
