-- Bodies of predictions: taken in whole, with a limit in time and in memory, before a request counts as
-- one that is under way.
local semaphore = require "ngx.semaphore"
local errors = require "errors"
local settings = require "settings"

local GRACE_SECONDS = 2 -- a body that takes longer may be given up to make room for another
local UNFAIR = 4 -- times as many arriving bytes as another client has
local LEAST_BYTES = 65536 -- that each connection counts for

local bodies = {}

-- Requests of this nginx worker whose bodies are still on their way, by their connections, and
-- the memory that they may take.
local arriving = {}
local arriving_bytes = 0

-- The body of a request has arrived, or never will. Returns its entry, if it has one.
function bodies.forget(connection)
    local entry = arriving[connection]
    if entry then
        arriving[connection] = nil
        arriving_bytes = arriving_bytes - entry.bytes
    end
    return entry
end

-- The arriving bytes of each client, the client with most, and the connection of its oldest request.
local function heaviest()
    local bytes, oldest, most = {}, {}, nil
    for connection, entry in pairs(arriving) do
        local client = entry.client
        bytes[client] = (bytes[client] or 0) + entry.bytes
        if not oldest[client] or entry.since < arriving[oldest[client]].since then
            oldest[client] = connection
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
        bodies.forget(oldest).leave:post(1)
    end
    return true
end

-- Take in the whole body, before the request counts as one that is under way, and go on at a named
-- location.
function bodies.receive(location)
    local client = ngx.var.client_id
    local length = tonumber(ngx.var.http_content_length)
    if ngx.var.http_transfer_encoding then
        length = settings.max_body_bytes -- unknown before it has arrived
    end
    local bytes = math.max(length or 0, LEAST_BYTES)
    if not make_room(client, bytes) then
        return ngx.exit(429)
    end
    local connection = ngx.var.connection
    local entry = { client = client, bytes = bytes, since = ngx.now(), leave = semaphore.new() }
    arriving[connection] = entry
    arriving_bytes = arriving_bytes + bytes
    local watch = ngx.thread.spawn(function()
        entry.leave:wait(settings.body_seconds) -- until it is posted, or time is up
        if not entry.is_refused then
            return ngx.exit(408)
        end
    end)
    ngx.req.read_body()
    ngx.thread.kill(watch)
    bodies.forget(connection)
    return ngx.exec(location)
end

-- Gives nginx's refusal of a request, perhaps while its body was arriving, the form of the handler's
-- errors. In a filter and not by error_page, which would take the request away from its own threads.
function bodies.refuse()
    local entry = bodies.forget(ngx.var.connection)
    if entry then
        entry.is_refused = true
    end
    ngx.ctx.refusal = errors.body()
    ngx.header["Content-Type"] = "application/json"
    ngx.header["Content-Length"] = #ngx.ctx.refusal
end

function bodies.print_refusal()
    ngx.arg[1] = ngx.ctx.refusal or ""
    ngx.ctx.refusal = nil -- the page may be sent in several pieces
end

return bodies
